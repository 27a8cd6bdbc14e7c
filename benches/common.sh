# What the benchmarks share; sourced by them in the top folder.
#
# Usage: begin DIRECTORY RUNS

set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
work= mounted= mistakes=0 runs=5 warmed=() limits=()

cleanup() {
  release_writeback
  [ -z "$mounted" ] || umount "$mounted" || true
  [ -z "$work" ] || rm -rf "$work"
}

# Lets the page cache hold what a benchmark writes, for all tools alike, where we may: at the
# kernel's own limits a writer is slowed down to the pace of the disk, more or less so from run to
# run.  Limits in bytes stand: those in percent would replace them.
hold_writeback() {
  local vm=/proc/sys/vm
  [ -w $vm/dirty_ratio ] && [ "$(cat $vm/dirty_bytes $vm/dirty_background_bytes | tr -d '\n')" = 00 ] || return 0
  limits=("$(<$vm/dirty_background_ratio)" "$(<$vm/dirty_ratio)")
  echo 60 >$vm/dirty_ratio
  echo 50 >$vm/dirty_background_ratio
}

release_writeback() {
  [ "${#limits[@]}" -eq 2 ] || return 0
  echo "${limits[0]}" >/proc/sys/vm/dirty_background_ratio
  echo "${limits[1]}" >/proc/sys/vm/dirty_ratio
}

# Makes the scratch directory and builds the binary.
begin() {
  mkdir -p "$1"
  work=$(mktemp -d "$(realpath "$1")/bench-XXXXXX")
  runs=$2
  trap cleanup EXIT
  trap 'exit 130' INT TERM
  hold_writeback
  cargo build --release --locked --quiet
  vdtool=$(realpath "${CARGO_TARGET_DIR:-target}/$(rustc --print host-tuple)/release/vdtool")
}

# The machine, the versions and the source.
introduce() {
  echo "$(nproc) cores ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)), $(free -g | awk '/Mem/ { print $2 }') GiB RAM, Linux $(uname -r)"
  echo "$(qemu-img --version | head -1); $("$vdtool" --version); medians of $runs runs each, in turn"
  echo "source: $1"
}

# Runs a command; sets `seconds` and `memory` (KiB: the most seen of RssAnon + RssShmem + VmPTE).
measured() {
  local start end pid key value rest now
  memory=0
  start=$EPOCHREALTIME
  "$@" >"$work/stdout" 2>"$work/stderr" &
  pid=$!
  while [ -e "/proc/$pid/status" ]; do
    now=0
    while read -r key value rest; do
      case $key in
        RssAnon: | RssShmem: | VmPTE:) now=$((now + value)) ;;
        State:) [ "$value" != Z ] || break 2 ;;
      esac
    done 2>/dev/null <"/proc/$pid/status" || break
    [ "$now" -le "$memory" ] || memory=$now
    read -rt 0.01 <> <(:) || true
  done
  wait "$pid" || {
    echo "failed: $*" >&2
    cat "$work/stderr" >&2
    exit 1
  }
  end=$EPOCHREALTIME
  seconds=$(awk -v a="$start" -v b="$end" 'BEGIN { printf "%.3f", b - a }')
}

# Touches as much memory as a run will fill with its target: where the machine is a guest that
# hands free memory back to its host, whoever comes first would pay for getting it again, which
# takes longer than the conversion.
touch_memory() {
  head -c 6G /dev/zero | tail -c 6G >/dev/null
  # It may have pushed the source out of the page cache.
  [ "${#warmed[@]}" -eq 0 ] || cat "${warmed[@]}" >/dev/null
}

# Waits until a server listens at $work/sock; its name is for the message.
await_server() {
  local tries
  for ((tries = 0; tries < 200; tries++)); do
    [ ! -S "$work/sock" ] || return 0
    sleep 0.05
  done
  echo "$1 does not come up" >&2
  exit 1
}

# The middle of numbers on stdin.
median() {
  sort -n | awk '{ v[NR] = $1 } END { print (NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2) }'
}

# Runs both tools in turn: name, target of ours, target of theirs, then for each its arguments up
# to '--'.  Prints a row of the table.
beside() {
  local name=$1 our_target=$2 their_target=$3 run
  shift 3
  local ours=() theirs=()
  while [ "$1" != -- ]; do
    ours+=("$1")
    shift
  done
  shift
  theirs=("$@")
  : >"$work/ours.s" && : >"$work/theirs.s" && : >"$work/ours.m" && : >"$work/theirs.m"
  for ((run = 0; run < runs; run++)); do
    rm -f "$our_target" "$their_target"
    sync
    touch_memory
    measured "$vdtool" "${ours[@]}" "$our_target"
    echo "$seconds" >>"$work/ours.s"
    echo "$memory" >>"$work/ours.m"
    rm -f "$our_target" "$their_target"
    sync
    touch_memory
    measured qemu-img "${theirs[@]}" "$their_target"
    echo "$seconds" >>"$work/theirs.s"
    echo "$memory" >>"$work/theirs.m"
  done
  # One of ours to compare the content of.
  rm -f "$their_target"
  measured "$vdtool" "${ours[@]}" "$our_target"
  local a b c d
  a=$(median <"$work/ours.s")
  b=$(median <"$work/theirs.s")
  c=$(sort -n "$work/ours.m" | tail -1)
  d=$(sort -n "$work/theirs.m" | tail -1)
  awk -v n="$name" -v a="$a" -v b="$b" -v c="$c" -v d="$d" 'BEGIN {
    printf "| %s | %.2f | %.2f | %.2f | %.1f | %.1f |\n", n, a, b, a / b, c / 1024, d / 1024 }'
}

same() {
  if "$@" >/dev/null; then return; fi
  echo "content differs: $*" >&2
  mistakes=1
}

head_of_table() {
  echo
  echo "| $1 | vdtool, s | qemu-img, s | ratio | vdtool, MiB | qemu-img, MiB |"
  echo "|---|---|---|---|---|---|"
}

# Makes $1, a disk of size $2 with a file system that holds real files: /usr/lib and what else it
# takes for at least $3 MiB (where the machine has them), at most $4 MiB.
build_source() {
  local tree="$work/tree" used=0 directory size least=$(($3 << 10)) most=$(($4 << 10))
  mkdir "$tree"
  for directory in /usr/lib /usr/share /usr/bin /usr/local /opt /usr/src; do
    [ -d "$directory" ] || continue
    size=$(du -skx "$directory" 2>/dev/null | cut -f1)
    [ $((used + size)) -le $most ] || continue
    cp -ax "$directory" "$tree/" 2>/dev/null || true
    used=$((used + size))
    [ "$used" -lt $least ] || break
  done
  truncate -s "$2" "$1"
  mkfs.ext4 -q -F -d "$tree" "$1"
  rm -rf "$tree"
  sync
}

# Has these files, and as root no others, in the page cache from now on.
warm() {
  warmed=("$@")
  sync
  [ "$(id -u)" -ne 0 ] || echo 1 >/proc/sys/vm/drop_caches 2>/dev/null || true
  cat "$@" >/dev/null
}
