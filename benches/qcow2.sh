#!/usr/bin/env bash
# vdtool beside qemu-img on qcow2: wall time, peak anonymous memory and sizes, in turn, on images
# that are built here.  Prints tables in Markdown and asserts nothing about time.
#
# Usage: benches/qcow2.sh [DIRECTORY [RUNS]]
#
# DIRECTORY (default: a new one under target/) needs some 30 GiB; RUNS is how often each tool runs
# (default 5).
cd "$(dirname "$0")/.."
. benches/common.sh

# Name, format of the target, source and its format, then options of the target for both.
pair() {
  local name=$1 to=$2 source=$3 from=$4
  shift 4
  warm "$source"
  beside "$name" "$work/ours" "$work/theirs" \
    convert -f "$from" -O "$to" "$@" "$source" -- convert -f "$from" -O "$to" "$@" "$source"
}

plain() {
  pair "raw to qcow2" qcow2 "$work/source.raw" raw
  same qemu-img compare -f raw -F qcow2 "$work/source.raw" "$work/ours"
  same qemu-img check -q -f qcow2 "$work/ours"
  pair "qcow2 to raw" raw "$work/source.qcow2" qcow2
  same cmp "$work/source.raw" "$work/ours"
}

# Out of order and with all threads it has: the best that the peer can do.
compressed() {
  local codec=$1 ours theirs
  warm "$work/small.raw"
  beside "raw to qcow2, $codec" "$work/ours" "$work/theirs" \
    convert -c -f raw -O qcow2 -o compression_type="$codec" "$work/small.raw" -- \
    convert -c -W -f raw -O qcow2 -o compression_type="$codec" "$work/small.raw"
  same qemu-img compare -f raw -F qcow2 "$work/small.raw" "$work/ours"
  same qemu-img check -q -f qcow2 "$work/ours"
  qemu-img convert -c -W -f raw -O qcow2 -o compression_type="$codec" "$work/small.raw" "$work/$codec.qcow2"
  ours=$(stat -c %s "$work/ours")
  theirs=$(stat -c %s "$work/$codec.qcow2")
  sizes+="| $codec | $ours | $theirs | $(awk -v a="$ours" -v b="$theirs" 'BEGIN { printf "%.3f", a / b }') |"$'\n'
  pair "qcow2, $codec, to raw" raw "$work/$codec.qcow2" qcow2
  same cmp "$work/small.raw" "$work/ours"
}

# Milliseconds that a command takes, start and end of the process included.
milliseconds() {
  local i start end
  start=$EPOCHREALTIME
  for ((i = 0; i < 50; i++)); do "$@" >/dev/null; done
  end=$EPOCHREALTIME
  awk -v a="$start" -v b="$end" 'BEGIN { printf "%.2f", (b - a) * 20 }'
}

looking() {
  local image
  echo
  echo "| | vdtool, ms | qemu-img, ms |"
  echo "|---|---|---|"
  for image in source zlib; do
    echo "| info of $image.qcow2 | $(milliseconds "$vdtool" info "$work/$image.qcow2") | $(milliseconds qemu-img info "$work/$image.qcow2") |"
    echo "| check of $image.qcow2 | $(milliseconds "$vdtool" check "$work/$image.qcow2") | $(milliseconds qemu-img check "$work/$image.qcow2") |"
  done
}

# Overwrites 64 MiB that are shared, compressed or below, on a copy each time: name, the image and,
# where the peer cannot write it, one like it.
overwritten() {
  local name=$1 image=$2 like=${3:-$2} tool run syncs=?
  : >"$work/ours.s" && : >"$work/theirs.s"
  for ((run = 0; run < runs; run++)); do
    for tool in ours theirs; do
      case $tool in
        ours) cp "$image" "$work/ours.qcow2" ;;
        theirs) cp "$like" "$work/theirs.qcow2" ;;
      esac
      sync
      case $tool in
        ours) measured "$vdtool" io -q -c 'write -P 2 0 64M' "$work/ours.qcow2" ;;
        theirs) measured qemu-io -c 'write -q -P 2 0 64M' "$work/theirs.qcow2" ;;
      esac
      echo "$seconds" >>"$work/$tool.s"
    done
  done
  same "$vdtool" io -r -c 'read -P 2 0 64M' "$work/ours.qcow2"
  same "$vdtool" check -q "$work/ours.qcow2"
  [ "$image" != "$like" ] || same qemu-img check -q "$work/ours.qcow2"
  if command -v strace >/dev/null; then
    cp "$image" "$work/ours.qcow2"
    syncs=$(strace -f -e trace=fdatasync "$vdtool" io -q -c 'write -P 2 0 64M' "$work/ours.qcow2" 2>&1 | grep -c fdatasync)
  fi
  awk -v n="$name" -v a="$(median <"$work/ours.s")" -v b="$(median <"$work/theirs.s")" -v s="$syncs" 'BEGIN {
    printf "| %s | %.3f | %.3f | %.2f | %s |\n", n, a, b, a / b, s }'
}

overwriting() {
  echo
  echo "| 64 MiB overwritten | vdtool io, s | qemu-io, s | ratio | vdtool's syncs |"
  echo "|---|---|---|---|---|"
  qemu-img create -q -f qcow2 "$work/shared.qcow2" 64M
  qemu-io -c 'write -q -P 1 0 64M' "$work/shared.qcow2"
  cp "$work/shared.qcow2" "$work/base.qcow2"
  qemu-img snapshot -c s "$work/shared.qcow2"
  overwritten "that a snapshot shares" "$work/shared.qcow2"
  qemu-img create -q -f qcow2 -b "$work/base.qcow2" -F qcow2 "$work/above.qcow2"
  overwritten "of the backing file" "$work/above.qcow2"
  qemu-img convert -c -f qcow2 -O qcow2 "$work/base.qcow2" "$work/packed.qcow2"
  overwritten "compressed" "$work/packed.qcow2"
  "$vdtool" convert -q -O vhd "$work/base.qcow2" "$work/parent.vhd"
  "$vdtool" create -q -f vhd -b "$work/parent.vhd" -F vhd "$work/child.vhd"
  overwritten "of a VHD's parent (qemu-io: of the backing file)" "$work/child.vhd" "$work/above.qcow2"
  qemu-img convert -O qcow2 -o cluster_size=4k "$work/base.qcow2" "$work/small.qcow2"
  qemu-img snapshot -c s "$work/small.qcow2"
  overwritten "that a snapshot shares, clusters of 4 KiB" "$work/small.qcow2"
}

begin "${1:-target}" "${2:-5}"
build_source "$work/source.raw" 8G 3584 6144
build_source "$work/small.raw" 3G 1024 2048
qemu-img convert -f raw -O qcow2 "$work/source.raw" "$work/source.qcow2"
sync
introduce "8 GiB ext4 image, $(($(stat -c '%b' "$work/source.raw") / 2048)) MiB of data; compressed: 3 GiB, $(($(stat -c '%b' "$work/small.raw") / 2048)) MiB"
head_of_table "sources in the page cache"
plain
sizes=
compressed zlib
compressed zstd
echo
echo "| compressed by | vdtool, bytes | qemu-img, bytes | ratio |"
echo "|---|---|---|---|"
echo -n "$sizes"
looking
overwriting
[ "$mistakes" -eq 0 ]
