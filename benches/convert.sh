#!/usr/bin/env bash
# vdtool beside qemu-img: wall time and peak anonymous memory, in turn, on an image that is built
# here.  Prints tables in Markdown and asserts nothing about time.
#
# Usage: benches/convert.sh [DIRECTORY [RUNS]]
#
# DIRECTORY (default: a new one under target/) needs some 40 GiB; RUNS is how often each tool runs
# (default 5).  As root it also makes an XFS (else btrfs) file system in a loop mount and
# converts there.
cd "$(dirname "$0")/.."
. benches/common.sh

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
  warm "$work/source.raw"
  beside "raw to vdi" "$dir/ours" "$dir/theirs" \
    convert -f raw -O vdi "$work/source.raw" -- convert -f raw -O vdi "$work/source.raw"
  same qemu-img compare -f raw -F vdi "$work/source.raw" "$dir/ours"
  warm "$work/source.vdi"
  beside "vdi to raw" "$dir/ours" "$dir/theirs" \
    convert -f vdi -O raw "$work/source.vdi" -- convert -f vdi -O raw "$work/source.vdi"
  same cmp "$work/source.raw" "$dir/ours"
  rm -f "$dir/ours" "$dir/theirs"
  truncate -s 2T "$work/empty.raw"
  warmed=()
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
  warm "$mounted/source.raw" "$mounted/source.vhd"
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

begin "${1:-target}" "${2:-5}"
build_source "$work/source.raw" 8G 3584 6144
qemu-img convert -f raw -O vpc -o force_size=on "$work/source.raw" "$work/source.vhd"
qemu-img convert -f raw -O vdi "$work/source.raw" "$work/source.vdi"
sync
introduce "8 GiB ext4 image, $(($(stat -c '%b' "$work/source.raw") / 2048)) MiB of data"
on_this_file_system "$work"
on_a_reflinking_file_system
start_up
[ "$mistakes" -eq 0 ]
