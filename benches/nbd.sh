#!/usr/bin/env bash
# `vdtool serve --nbd` beside qemu-nbd and nbdkit, with nbdcopy and fio as clients: wall time and the
# servers' time on the processor, in turn, on a disk that is built here.  Prints tables in Markdown
# and asserts nothing about time.
#
# Usage: benches/nbd.sh [DIRECTORY [RUNS]]
#
# DIRECTORY (default: a new one under target/) needs some 20 GiB; RUNS is how often each server is
# used (default 5).
cd "$(dirname "$0")/.."
. benches/common.sh

servers=(vdtool qemu-nbd nbdkit)
server_pid=

# Starts a server: name, image, and whether it takes writes (rw or ro).
serve() {
  local image=$2 access=$3
  rm -f "$work/sock"
  case $1 in
    vdtool)
      local ours=(-f raw --persistent --nbd "unix:$work/sock" "$image")
      [ "$access" = rw ] || ours=(-r "${ours[@]}")
      "$vdtool" serve "${ours[@]}" >/dev/null &
      ;;
    qemu-nbd)
      local theirs=(-t -e 16 -f raw -k "$work/sock" "$image")
      [ "$access" = rw ] || theirs=(-r "${theirs[@]}")
      qemu-nbd "${theirs[@]}" &
      ;;
    nbdkit)
      local theirs=(-f -U "$work/sock" file "$image")
      [ "$access" = rw ] || theirs=(-r "${theirs[@]}")
      nbdkit "${theirs[@]}" &
      ;;
  esac
  server_pid=$!
  await_server "$1"
}

# Ends the server; sets `cpu`, the seconds of processor time it took.
end_server() {
  local ticks
  ticks=$(awk '{ print $14 + $15 }' "/proc/$server_pid/stat")
  cpu=$(awk -v t="$ticks" -v h="$(getconf CLK_TCK)" 'BEGIN { printf "%.3f", t / h }')
  kill "$server_pid"
  wait "$server_pid" 2>/dev/null || true
}

# All servers in turn: title, image, access, what makes the image anew before each run (or :), and
# the client's command.
row() {
  local title=$1 image=$2 access=$3 before=$4 name run line=
  shift 4
  for name in "${servers[@]}"; do
    : >"$work/$name.s"
    : >"$work/$name.c"
  done
  for ((run = 0; run < runs; run++)); do
    for name in "${servers[@]}"; do
      "$before"
      serve "$name" "$image" "$access"
      measured "$@"
      echo "$seconds" >>"$work/$name.s"
      end_server
      echo "$cpu" >>"$work/$name.c"
    done
  done
  for name in "${servers[@]}"; do
    line+=" $(median <"$work/$name.s") $(median <"$work/$name.c")"
  done
  awk -v n="$title" -v l="$line" 'BEGIN {
    split(l, v, " ")
    printf "| %s | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f |\n",
      n, v[1], v[3], v[5], v[1] / v[3], v[1] / v[5], v[2], v[4], v[6] }'
}

empty_target() {
  rm -f "$work/target.raw" "$work/copy.raw"
  truncate -s 8G "$work/target.raw"
  sync
  touch_memory
}

# Requests a second of small random reads and writes: title, fio's arguments.
small() {
  local title=$1 name run line=
  shift
  for name in "${servers[@]}"; do : >"$work/$name.i"; done
  for ((run = 0; run < runs; run++)); do
    for name in "${servers[@]}"; do
      serve "$name" "$work/source.raw" rw
      fio --name=small --ioengine=nbd --uri="$uri" --bs=4k --size=1G --runtime=3 --time_based \
        --output-format=terse "$@" >"$work/fio"
      awk -F';' '{ print $8 + $49 }' "$work/fio" >>"$work/$name.i"
      end_server
    done
  done
  for name in "${servers[@]}"; do line+=" $(median <"$work/$name.i")"; done
  awk -v n="$title" -v l="$line" 'BEGIN {
    split(l, v, " ")
    printf "| %s | %d | %d | %d | %.2f | %.2f |\n", n, v[1], v[2], v[3], v[1] / v[2], v[1] / v[3] }'
}

begin "${1:-target}" "${2:-5}"
uri="nbd+unix:///?socket=$work/sock"
build_source "$work/source.raw" 8G 3500 6144
warm "$work/source.raw"
introduce "8 GiB, $(du -m "$work/source.raw" | cut -f1) MiB of data, in the page cache"
qemu-nbd --version | head -1
nbdkit --version
echo
echo "| nbdcopy --requests=64 | vdtool, s | qemu-nbd, s | nbdkit, s | to qemu-nbd | to nbdkit | vdtool, CPU s | qemu-nbd | nbdkit |"
echo "|---|---|---|---|---|---|---|---|---|"
row "to nowhere" "$work/source.raw" ro : nbdcopy --requests=64 "$uri" null:
row "to a file" "$work/source.raw" ro empty_target nbdcopy --requests=64 "$uri" "$work/copy.raw"
same cmp "$work/source.raw" "$work/copy.raw"
row "from a file" "$work/target.raw" rw empty_target nbdcopy --requests=64 --destination-is-zero "$work/source.raw" "$uri"
same cmp "$work/source.raw" "$work/target.raw"
if command -v fio >/dev/null && fio --enghelp=nbd >/dev/null 2>&1; then
  echo
  echo "| fio, 4 KiB at random, requests a second | vdtool | qemu-nbd | nbdkit | to qemu-nbd | to nbdkit |"
  echo "|---|---|---|---|---|---|"
  small "reads, one at a time" --rw=randread --iodepth=1
  small "reads, 64 at once" --rw=randread --iodepth=64
  small "writes, 64 at once" --rw=randwrite --iodepth=64
fi
exit "$mistakes"
