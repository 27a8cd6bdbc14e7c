#!/usr/bin/env bash
# Android COW files of 2 GiB (version 3, lz4): flattened by one worker and by two, beside `lz4 -dc` of the
# same content to a file; made of two disks of which one block in ten differs, beside reading both.
# Prints tables, and asserts nothing about time; without lz4 that row is left out by name.
#
# Usage: benches/updates.sh [DIRECTORY [RUNS]]
#
# DIRECTORY (default: a new one under target/) needs some 10 GiB; RUNS is how often each tool runs
# (default 5).
cd "$(dirname "$0")/.."
. benches/common.sh

# The shortest time of several, with what is read in the page cache.
shortest() {
  local run
  for ((run = 0; run < runs; run++)); do
    rm -f "$work/out"
    cat "${warmed[@]}" >/dev/null
    measured "$@"
    echo "$seconds"
  done >"$work/seconds"
  sort -n "$work/seconds" | head -1
}

row() {
  local name=$1 best
  shift
  best=$(shortest "$@")
  printf '%-24s %s s\n' "$name" "$best"
}

begin "${1:-target/benches}" "${2:-5}"
introduce "what is in /usr, 2 GiB of it"

size=$((2 << 30))
while find /usr -xdev -type f -size +8k -exec cat {} + 2>/dev/null; do :; done | head -c "$size" >"$work/new" || true
truncate -s "$size" "$work/empty"
"$vdtool" convert -q -O android-cow -o version=3,compression=lz4 -B "$work/empty" "$work/new" "$work/whole.cow"
echo
echo "flattened, shortest of $runs runs"
warmed=("$work/whole.cow")
over=(--parent "$work/empty")
row "vdtool -j 1" "$vdtool" convert -q -O raw -j 1 "${over[@]}" "$work/whole.cow" "$work/out"
cmp "$work/out" "$work/new"
row "vdtool -j 2" "$vdtool" convert -q -O raw -j 2 "${over[@]}" "$work/whole.cow" "$work/out"
if command -v lz4 >/dev/null; then
  lz4 -q -B4 -1 "$work/new" "$work/new.lz4"
  warmed=("$work/new.lz4")
  row "lz4 -dc" sh -c "lz4 -q -dc '$work/new.lz4' >'$work/out'"
else
  echo "lz4 -dc                  left out: it is not installed (apt-get install lz4)"
fi
rm -f "$work/whole.cow" "$work/new.lz4" "$work/empty"

# One block of 4 KiB in ten is another.
cp "$work/new" "$work/old"
for ((at = 0; at < size / 4096; at += 1280)); do echo "$at"; done |
  while read -r at; do
    dd if=/dev/urandom of="$work/old" bs=4096 seek="$at" count=128 conv=notrunc status=none
  done
warmed=("$work/old" "$work/new")
echo
echo "made of two disks, shortest of $runs runs"
row "vdtool -j 2" "$vdtool" convert -q -O android-cow -o version=3,compression=lz4 -j 2 -B "$work/old" "$work/new" "$work/out"
row "dd of both" sh -c "dd if='$work/old' bs=1M of=/dev/null status=none; dd if='$work/new' bs=1M of=/dev/null status=none"
