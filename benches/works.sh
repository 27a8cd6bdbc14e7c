#!/usr/bin/env bash
# vdtool beside qemu-img and qemu-io in many small works, each of which either may do badly: a disk
# of 1 GiB with data in 3000 scattered places, as images of several kinds.  Prints a table in
# Markdown with the ratio of each, the shortest time of each tool in turn, and how many works take at
# most 1.2 times as long as with the peer.  Asserts nothing about time.
#
# Usage: benches/works.sh [DIRECTORY [RUNS [PATTERN]]]
#
# DIRECTORY (default: a new one under target/) needs some 8 GiB; RUNS is how often each tool runs
# (default 3); PATTERN is a regular expression for the names of the works (default: all).
cd "$(dirname "$0")/.."
. benches/common.sh

works=0 within=0 pattern=
none=true

# Seconds that a shell command takes after the preparation `$1`; what it prints is thrown away.
seconds_of() {
  local prepare=$1 start end
  eval "$prepare" >/dev/null 2>"$work/stderr"
  sync
  start=$EPOCHREALTIME
  eval "$2" >/dev/null 2>"$work/stderr" || {
    echo "failed: $2" >&2
    cat "$work/stderr" >&2
    exit 1
  }
  end=$EPOCHREALTIME
  awk -v a="$start" -v b="$end" 'BEGIN { printf "%.4f\n", b - a }'
}

# One row: name, preparation, command of ours, command of theirs.
beside_in_turn() {
  local name=$1 prepare=$2 ours=$3 theirs=$4 run a b
  [[ $name =~ $pattern ]] || return 0
  : >"$work/ours.s" && : >"$work/theirs.s"
  for ((run = 0; run < runs; run++)); do
    seconds_of "$prepare" "$ours" >>"$work/ours.s"
    seconds_of "$prepare" "$theirs" >>"$work/theirs.s"
  done
  a=$(sort -n "$work/ours.s" | head -1)
  b=$(sort -n "$work/theirs.s" | head -1)
  works=$((works + 1))
  awk -v n="$name" -v a="$a" -v b="$b" 'BEGIN {
    printf "| %s | %.3f | %.3f | %.2f |\n", n, a, b, a / b
    exit !(a <= 1.2 * b) }' && within=$((within + 1)) || true
}

# The same arguments for vdtool and qemu-img.
both() {
  beside_in_turn "$1" "$2" "$vdtool $3" "qemu-img $3"
}

# Lines of `io` in file $1, made by the awk program $2, to image $3 after the preparation $4.
lines() {
  local name=$1 program=$2 image=$3 prepare=$4 options=${5:-}
  local script="$work/lines.${name//[^a-z0-9]/-}"
  # Large numbers as numbers, in every awk.
  awk -v OFMT=%.0f "BEGIN { srand(5); $program }" >"$script"
  beside_in_turn "$name" "$prepare" "$vdtool io -q $options $image <$script" "qemu-io $options $image <$script"
}

build_images() {
  python3 - <<'PY'
import os, random
random.seed(5)
with open('raw', 'wb') as disk:
    disk.truncate(1 << 30)
    for _ in range(3000):
        disk.seek(random.randrange(1 << 14) << 16)
        disk.write(os.urandom(32 << 10) + bytes(32 << 10))
PY
  qemu-img convert -O qcow2 raw qcow2
  qemu-img convert -c -O qcow2 raw zlib
  qemu-img convert -c -O qcow2 -o compression_type=zstd raw zstd
  qemu-img convert -O qcow2 -o cluster_size=4k raw small
  qemu-img convert -O qcow2 -o extended_l2=on,cluster_size=128k raw extended
  qemu-img convert -O vpc -o force_size=on raw vhd
  local image
  for image in middle:qcow2:5111808:5 top:middle:4111808:6; do
    IFS=: read -r image below step byte <<<"$image"
    qemu-img create -q -f qcow2 -b "$below" -F qcow2 "$image"
    awk -v s="$step" -v b="$byte" 'BEGIN { for (i = 0; i < 200; i++) print "write -q -P", b, i * s, 20000 }' |
      qemu-io "$image" >/dev/null
  done
  qemu-img create -q -f qcow2 snapshots 100M
  for ((i = 0; i < 500; i++)); do qemu-img snapshot -c "s$i" snapshots; done
}

looking_and_copying() {
  local image theirs
  for image in qcow2 zlib zstd small extended vhd; do
    theirs=
    [ $image != vhd ] || theirs='-f vpc'
    beside_in_turn "info, $image" $none "$vdtool info $image" "qemu-img info $theirs $image"
    beside_in_turn "map, $image" $none "$vdtool map --output json $image" "qemu-img map $theirs --output json $image"
    [ $image = vhd ] || both "check, $image" $none "check $image"
    beside_in_turn "convert to raw, $image" 'rm -f o' "$vdtool convert -O raw $image o" "qemu-img convert $theirs -O raw $image o"
    beside_in_turn "convert to qcow2, $image" 'rm -f o' "$vdtool convert -O qcow2 $image o" "qemu-img convert $theirs -O qcow2 $image o"
    beside_in_turn "compare with raw, $image" $none "$vdtool compare -F raw $image raw" "qemu-img compare $theirs -F raw $image raw"
    beside_in_turn "measure, $image" $none "$vdtool measure -O qcow2 $image" "qemu-img measure $theirs -O qcow2 $image"
  done
}

converting() {
  local options
  for options in cluster_size=4k cluster_size=2M extended_l2=on,cluster_size=128k; do
    both "convert to $options" 'rm -f o' "convert -O qcow2 -o $options raw o"
  done
  both 'convert -n to an empty qcow2' 'rm -f o; qemu-img create -q -f qcow2 o 1G' 'convert -n -O qcow2 raw o'
  both 'convert -S 0' 'rm -f o' 'convert -S 0 -O raw qcow2 o'
  both 'convert -S 4k' 'rm -f o' 'convert -S 4k -O raw qcow2 o'
  both 'convert -t none' 'rm -f o' 'convert -t none -O raw qcow2 o'
  both 'convert -T none' 'rm -f o' 'convert -T none -O raw qcow2 o'
  both 'convert two sources' 'rm -f o' 'convert -O raw qcow2 qcow2 o'
  both 'convert a chain of three' 'rm -f o' 'convert -O raw top o'
}

changing() {
  local copy='cp qcow2 w' writes
  writes=$(awk 'BEGIN { for (i = 0; i < 300; i++) printf "write -q -P 6 %d 30000\\n", i * 3111808 }')
  both 'commit of small writes' "cp middle x; qemu-img create -q -f qcow2 -b x -F qcow2 w; printf '$writes' | qemu-io w" 'commit w'
  both 'rebase to nothing' 'cp top w' "rebase -b '' w"
  both 'rebase to the base' 'cp top w' 'rebase -b qcow2 -F qcow2 w'
  both 'snapshot -c' "$copy" 'snapshot -c a w'
  both 'snapshot -a' "$copy; qemu-img snapshot -c a w" 'snapshot -a a w'
  both 'snapshot -d' "$copy; qemu-img snapshot -c a w" 'snapshot -d a w'
  both 'snapshot -l of 500' $none 'snapshot -l snapshots'
  both 'check of 500 snapshots' $none 'check snapshots'
  both 'resize, longer' "$copy" 'resize w +1T'
  both 'resize, shorter' "$copy" 'resize --shrink w 300M'
  both 'amend refcount_bits' "$copy" 'amend -o refcount_bits=64 w'
  both 'amend compat' "$copy" 'amend -o compat=0.10 w'
  # The first entry of the first-level table, at the offset that the header has at 40.
  local drop="$copy; at=\$((16#\$(xxd -s 40 -l 8 -p w))); head -c 8 /dev/zero | dd of=w bs=1 seek=\$at conv=notrunc"
  both 'check -r all of leaks' "$drop" 'check -q -r all w'
  beside_in_turn 'bitmap, three changes' "$copy" \
    "$vdtool bitmap --add w b && $vdtool bitmap --add w c && $vdtool bitmap --merge b w c" \
    'qemu-img bitmap --add w b && qemu-img bitmap --add w c && qemu-img bitmap --merge b w c'
}

requests() {
  local random='int(rand() * 262144) * 4096'
  lines 'io, 20000 writes to a new qcow2' 'for (i = 0; i < 20000; i++) print "write -q -P 1", int(rand() * 1048576) * 4096, "4k"' \
    w 'qemu-img create -q -f qcow2 w 4G'
  qemu-img create -q -f qcow2 -o preallocation=metadata tables 1G
  lines 'io, 20000 writes to preallocated tables' "for (i = 0; i < 20000; i++) print \"write -q -P 1\", $random, \"4k\"" tables $none
  lines 'io, 20000 reads, zlib' "for (i = 0; i < 20000; i++) print \"read -q\", $random, \"4k\"" zlib $none -r
  lines 'io, 5000 writes over a backing file' "for (i = 0; i < 5000; i++) print \"write -q -P 1\", $random, \"4k\"" \
    w 'qemu-img create -q -f qcow2 -b qcow2 -F qcow2 w'
  lines 'io, 5000 discards' 'for (i = 0; i < 5000; i++) print "discard -q", int(rand() * 16384) * 65536, "64k"' w 'cp qcow2 w'
  lines 'io, 5000 discards above a backing file' 'for (i = 0; i < 5000; i++) print "discard -q", int(rand() * 16384) * 65536, "64k"' \
    w 'cp qcow2 w; qemu-img rebase -u -b raw -F raw w'
  lines 'io, 5000 writes, clusters of 4 KiB' "for (i = 0; i < 5000; i++) print \"write -q -P 1\", $random, \"4k\"" w 'cp small w'
  lines 'io, 3000 writes, 300 flushes' "for (i = 0; i < 3000; i++) { print \"write -q -P 1\", $random, \"4k\"; if (i % 10 == 0) print \"flush\" }" w 'cp qcow2 w'
}

# Space that a raw target takes where little data is strewn among zeroes.
sizes() {
  local step source how ours theirs
  echo
  echo "| 64 MiB to raw, 4 KiB of data in each | source | options | vdtool, KiB | qemu-img, KiB | ratio |"
  echo "|---|---|---|---|---|---|"
  for step in 65536 1048576; do
    python3 -c "
import os
with open('strewn', 'wb') as disk:
    for _ in range((64 << 20) // $step): disk.write(os.urandom(4096) + bytes($step - 4096))"
    qemu-img convert -O qcow2 strewn strewn.qcow2
    qemu-img convert -c -O qcow2 strewn strewn.64k
    qemu-img convert -c -O qcow2 -o cluster_size=2M strewn strewn.2M
    for source in strewn strewn.qcow2 strewn.64k strewn.2M; do
      for how in '' '-S 4k'; do
        rm -f o p
        "$vdtool" convert -q $how -O raw "$source" o
        qemu-img convert $how -O raw "$source" p
        same cmp strewn o
        sync
        ours=$(du -k o | cut -f1)
        theirs=$(du -k p | cut -f1)
        echo "| $((step >> 10)) KiB | ${source#strewn} | $how | $ours | $theirs | $(awk -v a="$ours" -v b="$theirs" 'BEGIN { printf "%.2f", a / b }') |"
      done
    done
  done
}

begin "${1:-target}" "${2:-3}"
pattern=${3:-}
cd "$work"
introduce "1 GiB, 32 KiB of data in each of 3000 places"
build_images
echo
echo "| work | vdtool, s | peer, s | ratio |"
echo "|---|---|---|---|"
looking_and_copying
converting
changing
requests
echo
echo "$within of $works within 1.2 of the peer."
[ -n "$pattern" ] || sizes
[ "$mistakes" -eq 0 ]
