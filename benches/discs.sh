#!/usr/bin/env bash
# CD images: how fast the codes of sectors are made and verified on one core, and vdtool beside bchunk
# from sectors of 2352 bytes to the 2048 of a disk.  bchunk drops the codes unread; vdtool verifies
# them on the way.  Prints tables, and asserts nothing about time; without bchunk that part is left
# out by name.
#
# Usage: benches/discs.sh [DIRECTORY [RUNS]]
#
# DIRECTORY (default: a new one under target/) needs some 3 GiB; RUNS is how often each tool runs
# (default 5).
cd "$(dirname "$0")/.."
. benches/common.sh

# The shortest time of several; what is made is there afterwards.
shortest() {
  local run
  for ((run = 0; run < runs; run++)); do
    cat "$work/disc.cue" "$work/disc.bin" >/dev/null
    rm -f "$work/ours.iso" "$work"/theirs*
    measured "$@"
    echo "$seconds"
  done >"$work/seconds"
  sort -n "$work/seconds" | head -1
}

row() {
  local name=$1 best
  shift
  best=$(shortest "$@")
  printf '%-12s %s s\n' "$name" "$best"
}

begin "${1:-target/benches}" "${2:-5}"
cargo run --release --locked --quiet --example disc-codes

head -c $((300000 * 2048)) /dev/urandom >"$work/disc.iso"
"$vdtool" convert -O cue "$work/disc.iso" "$work/disc.cue"
cmp <("$vdtool" convert "$work/disc.cue" -) "$work/disc.iso"
echo
echo "300000 sectors of 2352 bytes to 2048, shortest of $runs runs"
row vdtool "$vdtool" convert "$work/disc.cue" "$work/ours.iso"
row "vdtool -j 1" "$vdtool" convert -j 1 "$work/disc.cue" "$work/ours.iso"
if command -v bchunk >/dev/null; then
  row bchunk bchunk "$work/disc.bin" "$work/disc.cue" "$work/theirs"
  cmp "$work"/theirs01.iso "$work/disc.iso"
else
  echo "bchunk       left out: it is not installed (apt-get install bchunk)"
fi
