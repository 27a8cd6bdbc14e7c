#!/usr/bin/env bash
# vdtool beside qemu-img: wall time and peak anonymous memory, in turn, on an image that is built
# here.  Prints tables in Markdown and asserts nothing about time.
#
# Usage: benches/convert.sh [DIRECTORY [RUNS]]
#
# DIRECTORY (default: a new one under target/) needs some 60 GiB; RUNS is how often each tool runs
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
  warm "$work/source.raw"
  beside "raw to vhdx" "$dir/ours" "$dir/theirs" \
    convert -f raw -O vhdx "$work/source.raw" -- convert -f raw -O vhdx "$work/source.raw"
  same qemu-img compare -f raw -F vhdx "$work/source.raw" "$dir/ours"
  warm "$work/source.vhdx"
  beside "vhdx to raw" "$dir/ours" "$dir/theirs" \
    convert -f vhdx -O raw "$work/source.vhdx" -- convert -f vhdx -O raw "$work/source.vhdx"
  same cmp "$work/source.raw" "$dir/ours"
  warm "$work/source.raw"
  beside "raw to vmdk (sparse)" "$dir/ours" "$dir/theirs" \
    convert -f raw -O vmdk "$work/source.raw" -- convert -f raw -O vmdk "$work/source.raw"
  same qemu-img compare -f raw -F vmdk "$work/source.raw" "$dir/ours"
  warm "$work/source.vmdk"
  beside "vmdk to raw" "$dir/ours" "$dir/theirs" \
    convert -f vmdk -O raw "$work/source.vmdk" -- convert -f vmdk -O raw "$work/source.vmdk"
  same cmp "$work/source.raw" "$dir/ours"
  warm "$work/source.raw"
  beside "raw to vmdk (streamOptimized)" "$dir/ours" "$dir/theirs" \
    convert -f raw -O vmdk -o subformat=streamOptimized "$work/source.raw" -- \
    convert -f raw -O vmdk -o subformat=streamOptimized "$work/source.raw"
  same qemu-img compare -f raw -F vmdk "$work/source.raw" "$dir/ours"
  warm "$work/stream.vmdk"
  beside "vmdk (streamOptimized) to raw" "$dir/ours" "$dir/theirs" \
    convert -f vmdk -O raw "$work/stream.vmdk" -- convert -f vmdk -O raw "$work/stream.vmdk"
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

# An appliance to qcow2: in place, beside its disk unpacked first.
appliance() {
  local run
  "$vdtool" convert -f raw -o name=vm "$work/source.raw" "$work/source.ova"
  : >"$work/ours.s" && : >"$work/theirs.s"
  for ((run = 0; run < runs; run++)); do
    rm -rf "$work/ours" "$work/theirs" "$work/unpacked"
    sync
    warm "$work/source.ova"
    touch_memory
    measured "$vdtool" convert -O qcow2 "$work/source.ova" "$work/ours"
    echo "$seconds" >>"$work/ours.s"
    rm -rf "$work/ours"
    mkdir "$work/unpacked"
    sync
    touch_memory
    measured unpack_and_convert
    echo "$seconds" >>"$work/theirs.s"
  done
  rm -rf "$work/unpacked"
  "$vdtool" convert -O qcow2 "$work/source.ova" "$work/ours"
  same qemu-img compare -f raw -F qcow2 "$work/source.raw" "$work/ours"
  rm -f "$work/ours" "$work/theirs" "$work/source.ova"
  echo
  awk -v a="$(median <"$work/ours.s")" -v b="$(median <"$work/theirs.s")" 'BEGIN {
    printf "OVA to qcow2: %.2f s, with its manifest compared; `tar x` and `qemu-img convert`: %.2f s; ratio %.2f.\n", a, b, a / b }'
}

unpack_and_convert() {
  tar -xf "$work/source.ova" -C "$work/unpacked"
  qemu-img convert -f vmdk -O qcow2 "$work/unpacked/vm-disk1.vmdk" "$work/theirs"
}

# An empty VHDX of 64 TiB: how long it takes to be opened, and to become a qcow2.
empty_vhdx() {
  local size run
  echo
  for size in 1M 32M; do
    "$vdtool" create -q -f vhdx -o "block_size=$size" "$work/empty.vhdx" 64T
    : >"$work/ours.s" && : >"$work/theirs.s" && : >"$work/ours.m"
    for ((run = 0; run < runs; run++)); do
      measured "$vdtool" info "$work/empty.vhdx"
      echo "$seconds" >>"$work/ours.s"
      rm -f "$work/ours"
      measured "$vdtool" convert -O qcow2 "$work/empty.vhdx" "$work/ours"
      echo "$seconds" >>"$work/theirs.s"
      echo "$memory" >>"$work/ours.m"
    done
    rm -f "$work/ours" "$work/empty.vhdx"
    awk -v n="$size" -v a="$(median <"$work/ours.s")" -v b="$(median <"$work/theirs.s")" \
      -v c="$(sort -n "$work/ours.m" | tail -1)" 'BEGIN {
      printf "An empty VHDX of 64 TiB in blocks of %s: `info` %.0f ms, to qcow2 %.2f s and %.1f MiB.\n", n, a * 1000, b, c / 1024 }'
  done
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
qemu-img convert -f raw -O vhdx "$work/source.raw" "$work/source.vhdx"
qemu-img convert -f raw -O vmdk "$work/source.raw" "$work/source.vmdk"
qemu-img convert -f raw -O vmdk -o subformat=streamOptimized "$work/source.raw" "$work/stream.vmdk"
sync
introduce "8 GiB ext4 image, $(($(stat -c '%b' "$work/source.raw") / 2048)) MiB of data"
on_this_file_system "$work"
on_a_reflinking_file_system
appliance
empty_vhdx
start_up
[ "$mistakes" -eq 0 ]
