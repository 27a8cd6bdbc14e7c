#!/usr/bin/env bash
# vdtool beside qemu-img: wall time and peak anonymous memory, in turn, on an image that is built
# here.  Prints tables in Markdown and asserts nothing about time.
#
# Usage: benches/convert.sh [DIRECTORY [RUNS]]
#
# DIRECTORY (default: a new one under target/) needs some 30 GiB; RUNS is how often each tool runs
# (default 5).  As root it also makes an XFS (else btrfs) file system in a loop mount and
# converts there.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
cd "$(dirname "$0")/.."

runs=${2:-5}
mkdir -p "${1:-target}"
work=$(mktemp -d "$(realpath "${1:-target}")/bench-XXXXXX")
mounted=
mistakes=0

cleanup() {
  [ -z "$mounted" ] || umount "$mounted" || true
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

cargo build --release --locked --quiet
vdtool=$(realpath "${CARGO_TARGET_DIR:-target}/$(rustc --print host-tuple)/release/vdtool")

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

# An 8 GiB disk with a file system that holds real files: /usr/lib, and more where that has less
# than 3.5 GiB.
build_source() {
  local tree="$work/tree" used=0 directory size
  mkdir "$tree"
  for directory in /usr/lib /usr/share /usr/bin /usr/local /opt /usr/src; do
    [ -d "$directory" ] || continue
    size=$(du -skx "$directory" 2>/dev/null | cut -f1)
    [ $((used + size)) -le $((6 << 20)) ] || continue
    cp -ax "$directory" "$tree/" 2>/dev/null || true
    used=$((used + size))
    [ "$used" -lt $((7 << 19)) ] || break
  done
  truncate -s 8G "$work/source.raw"
  mkfs.ext4 -q -F -d "$tree" "$work/source.raw"
  rm -rf "$tree"
  qemu-img convert -f raw -O vpc -o force_size=on "$work/source.raw" "$work/source.vhd"
  sync
}

warm() {
  cat "$@" >/dev/null
}

on_this_file_system() {
  local dir=$1
  head_of_table "$(stat -f -c %T "$dir" | sed 's,ext2/ext3,ext4,'), source in the page cache"
  warm "$work/source.raw"
  beside "raw to raw" "$dir/ours" "$dir/theirs" \
    convert -f raw -O raw "$work/source.raw" -- convert -f raw -O raw "$work/source.raw"
  same cmp "$work/source.raw" "$dir/ours"
  warm "$work/source.raw"
  beside "raw to vhd" "$dir/ours" "$dir/theirs" \
    convert -f raw -O vhd "$work/source.raw" -- convert -f raw -O vpc "$work/source.raw"
  same qemu-img compare -f raw -F vpc "$work/source.raw" "$dir/ours"
  warm "$work/source.vhd"
  beside "vhd to raw" "$dir/ours" "$dir/theirs" \
    convert -f vhd -O raw "$work/source.vhd" -- convert -f vpc -O raw "$work/source.vhd"
  same cmp "$work/source.raw" "$dir/ours"
  rm -f "$dir/ours" "$dir/theirs"
  truncate -s 2T "$work/empty.raw"
  beside "empty 2 TiB raw to raw" "$dir/ours" "$dir/theirs" \
    convert -f raw -O raw "$work/empty.raw" -- convert -f raw -O raw "$work/empty.raw"
  [ "$(stat -c '%s %b' "$dir/ours")" = "$((2 << 40)) 0" ] || {
    echo "the empty disk is not empty: $(stat -c '%s %b' "$dir/ours")" >&2
    mistakes=1
  }
  rm -f "$dir/ours" "$dir/theirs" "$work/empty.raw"
}

# A file system that shares blocks, mounted from a file; fails where that is not allowed.
mount_reflinking() {
  [ "$(id -u)" -eq 0 ] || return 1
  truncate -s 24G "$work/fs.img"
  mkdir "$work/mnt"
  if command -v mkfs.xfs >/dev/null; then
    mkfs.xfs -q -m reflink=1 "$work/fs.img" || return 1
  else
    mkfs.btrfs -q "$work/fs.img" || return 1
  fi
  mount -o loop "$work/fs.img" "$work/mnt" 2>/dev/null || return 1
  mounted=$work/mnt
}

on_a_reflinking_file_system() {
  if ! mount_reflinking; then
    echo "skipped: no file system that shares blocks can be mounted here (needs root, loop devices, mkfs.xfs or mkfs.btrfs)"
    return
  fi
  local before after
  cp "$work/source.raw" "$work/source.vhd" "$mounted/"
  sync
  head_of_table "$(stat -f -c %T "$mounted") with reflinks"
  beside "raw to raw" "$mounted/ours" "$mounted/theirs" \
    convert -f raw -O raw "$mounted/source.raw" -- convert -f raw -O raw "$mounted/source.raw"
  same cmp "$mounted/source.raw" "$mounted/ours"
  rm -f "$mounted/ours"
  sync
  before=$(df -k --output=used "$mounted" | tail -1)
  "$vdtool" convert -f raw -O raw "$mounted/source.raw" "$mounted/ours"
  sync
  after=$(df -k --output=used "$mounted" | tail -1)
  beside "vhd to raw" "$mounted/ours" "$mounted/theirs" \
    convert -f vhd -O raw "$mounted/source.vhd" -- convert -f vpc -O raw "$mounted/source.vhd"
  same cmp "$mounted/source.raw" "$mounted/ours"
  echo
  echo "Raw to raw took $((after - before)) KiB of new space there."
}

start_up() {
  local i start end
  "$vdtool" create -q -f vhd "$work/small.vhd" 64M
  start=$EPOCHREALTIME
  for ((i = 0; i < 200; i++)); do
    "$vdtool" info "$work/small.vhd" >/dev/null
  done
  end=$EPOCHREALTIME
  echo
  awk -v a="$start" -v b="$end" 'BEGIN {
    printf "`vdtool info` of a small VHD, start and end of the process included: %.2f ms.\n", (b - a) * 5 }'
}

build_source
echo "$(nproc) cores ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)), $(free -g | awk '/Mem/ { print $2 }') GiB RAM, Linux $(uname -r)"
echo "$(qemu-img --version | head -1); $("$vdtool" --version); medians of $runs runs each, in turn"
echo "source: 8 GiB ext4 image, $(($(stat -c '%b' "$work/source.raw") / 2048)) MiB of data"
on_this_file_system "$work"
on_a_reflinking_file_system
start_up
[ "$mistakes" -eq 0 ]
