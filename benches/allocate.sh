#!/usr/bin/env bash
# Writes into new images through `vdtool serve --nbd` beside qemu-nbd, for each format that gives
# space as it is written: wall time in turn, with fio as client.  Prints a table in Markdown and
# asserts nothing about time.
#
# Usage: [OLD=BINARY] benches/allocate.sh [DIRECTORY [RUNS]]
#
# DIRECTORY (default: a new one under target/) needs some 4 GiB; RUNS is how often each server is
# used (default 5).  OLD is another vdtool to be compared with this one.
cd "$(dirname "$0")/.."
. benches/common.sh

servers=(vdtool qemu-nbd)
[ -z "${OLD:-}" ] || servers+=(old)

# Makes a new image and starts a server of it: name, format.
serve_new() {
  local format=$2 theirs=$2 tool=$vdtool
  [ "$format" != vhd ] || theirs=vpc
  rm -f "$work/sock" "$work/image"
  # By their tool for all, so that all have the same.
  qemu-img create -q -f "$theirs" "$work/image" 4G
  sync
  case $1 in
    qemu-nbd) qemu-nbd -t -e 16 -f "$theirs" -k "$work/sock" "$work/image" & ;;
    *)
      [ "$1" != old ] || tool=$OLD
      "$tool" serve -f "$format" --persistent --nbd "unix:$work/sock" "$work/image" >/dev/null &
      ;;
  esac
  server_pid=$!
  await_server "$1"
}

# All servers in turn: title, format, fio's arguments.
row() {
  local title=$1 format=$2 name run line=
  shift 2
  for name in "${servers[@]}"; do : >"$work/$name.s"; done
  for ((run = 0; run < runs; run++)); do
    for name in "${servers[@]}"; do
      serve_new "$name" "$format"
      measured fio --name=new --ioengine=nbd --uri="nbd+unix:///?socket=$work/sock" --size=4G \
        --randrepeat=1 --end_fsync=1 "$@"
      echo "$seconds" >>"$work/$name.s"
      kill "$server_pid"
      wait "$server_pid" 2>/dev/null || true
      [ "$name" != vdtool ] || same "$vdtool" check -q -f "$format" "$work/image"
    done
  done
  for name in "${servers[@]}"; do line+=" $(median <"$work/$name.s")"; done
  awk -v n="$title" -v l="$line" 'BEGIN {
    k = split(l, v, " ")
    printf "| %s | %.2f | %.2f | %.2f |", n, v[1], v[2], v[1] / v[2]
    if (k > 2) printf " %.2f | %.2f |", v[3], v[1] / v[3]
    print "" }'
}

begin "${1:-target}" "${2:-5}"
if ! fio --enghelp=nbd >/dev/null 2>&1; then
  echo "needs fio with its engine for NBD" >&2
  exit 1
fi
introduce "new images of 4 GiB"
echo
if [ -z "${OLD:-}" ]; then
  echo "| into a new image, then a flush | vdtool, s | qemu-nbd, s | ratio |"
  echo "|---|---|---|---|"
else
  echo "| into a new image, then a flush | vdtool, s | qemu-nbd, s | ratio | old, s | to old |"
  echo "|---|---|---|---|---|---|"
fi
for format in vhd vdi qcow2; do
  # What does not know the format.
  [ "$format" != vdi ] || servers=(vdtool qemu-nbd)
  row "$format, 64 MiB, 4 KiB at random, 16 at once" "$format" \
    --rw=randwrite --bs=4k --iodepth=16 --io_size=64M
  row "$format, 1 GiB, 64 KiB in order, 4 at once" "$format" \
    --rw=write --bs=64k --iodepth=4 --io_size=1G
  [ -z "${OLD:-}" ] || servers=(vdtool qemu-nbd old)
done
exit "$mistakes"
