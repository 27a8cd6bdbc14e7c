#!/usr/bin/env bash
# `vdtool serve --ublk` beside rublk, the kernel's loop and nbd devices and a target that does
# nothing, in one virtual machine; the devices take turns.  Prints tables in Markdown and asserts
# nothing about time: in an emulator only the ratios of one run say something.
#
# Usage: benches/ublk.sh [new|old [ROUNDS [SECONDS]]]
#
# `new` (default) is the newest kernel in Debian, whose ublk has zero copy, `old` Debian 12's 6.12;
# each of the ROUNDS (default 3) gives each of the six patterns SECONDS (default 1) on each device.
# With COUNT=1 in the environment the guest has one processor whose clock counts the instructions that
# it executes: what a request costs the client, the kernel and the server together, the same on a
# busy machine and in each round, so that one round is enough.  What two queues bring, and idle
# processors, it cannot tell.
#
# Needs what tests/vm/setup needs; qemu-nbd with nbd-client, and rublk, which is built from its
# registry and needs libclang-dev, are left out where they cannot be had.
cd "$(dirname "$0")/.."
. benches/common.sh

kernel=${1:-new} rounds=${2:-3} seconds=${3:-1}
begin target "$rounds"
cache=$(dirname "$(dirname "$vdtool")")/tmp/vm
tests/vm/setup "$cache" "$kernel"
guest=$work/guest
mkdir -p "$guest/bin"
cp benches/ublk/guest "$guest/run"
cargo build --release --locked --quiet --example ublk-null
cp "$vdtool" "$(dirname "$vdtool")/examples/ublk-null" "$guest/bin/"

tuple=$(rustc --print host-tuple)
if [ ! -x target/rublk/bin/rublk ]; then
  RUSTFLAGS='-C target-feature=+crt-static' cargo install rublk --version 0.2.15 --quiet \
    --root target/rublk --target "$tuple" 2>"$work/rublk.log" ||
    echo "rublk is left out: it was not built ($(tail -n 1 "$work/rublk.log"); it needs libclang-dev)"
fi
[ ! -x target/rublk/bin/rublk ] || cp target/rublk/bin/rublk "$guest/bin/"
peers=()
if command -v qemu-nbd >/dev/null && command -v nbd-client >/dev/null; then
  tests/vm/pack programs "$work/peers.cpio" qemu-nbd nbd-client
  peers=("$work/peers.cpio")
else
  echo "qemu-nbd is left out: it or nbd-client is not installed"
fi

processors=2 queues=(1 2)
if [ -n "${COUNT:-}" ]; then
  processors=1 queues=(1)
  export ACCEL=tcg,thread=single ARGS="-icount shift=1"
  echo "the guest's clock counts instructions, two nanoseconds each"
fi
EXTRA="${peers[*]}" MEMORY=3072 CPUS=$processors SECONDS_ALLOWED=3600 \
  tests/vm/boot "$cache" "$kernel" "$guest" "$kernel" "$rounds" "$seconds" "${queues[@]}" >"$work/log" || mistakes=1
if grep -q '^FAILED' "$work/log"; then
  sed -n '/^FAILED/,+8p' "$work/log" >&2
  mistakes=1
fi

echo "$(nproc) cores ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)); a guest of $processors emulated, Linux $(sed -n 's/^LINUX //p' "$work/log"), images in its tmpfs"
echo "$("$vdtool" --version); $(qemu-nbd --version 2>/dev/null | head -1); $(target/rublk/bin/rublk --version 2>/dev/null | head -1)"
awk -v rounds="$rounds" -v most="${#queues[@]}" '
  function median(key, i, j, n, t, v) {
    n = split(values[key], v, " ")
    for (i = 2; i <= n; i++)
      for (j = i; j > 1 && v[j] + 0 < v[j - 1] + 0; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
    best[key] = v[n]
    return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
  }
  function ratio(device, to) { return to > 0 ? sprintf("%.2f", device / to) : "-" }
  $1 == "RESULT" {
    key = $2 SUBSEP $3 SUBSEP $4
    values[key] = values[key] " " $5
    if (!(($2, $3) in seen)) { seen[$2, $3] = 1; rows[++count] = $2 SUBSEP $3 }
  }
  END {
    cells = split("randread-1 randread-2 randwrite-1 randwrite-2 read-512k write-512k", cell, " ")
    for (r = 1; r <= count; r++)
      for (c = 1; c <= cells; c++) mid[rows[r], cell[c]] = median(rows[r] SUBSEP cell[c])
    print "\nRequests a second, median (best) of " rounds " rounds; -1 and -2: jobs of 4 KiB at depth 32:\n"
    printf "| device | queues |"
    for (c = 1; c <= cells; c++) printf " %s |", cell[c]
    printf "\n|---|---|"
    for (c = 1; c <= cells; c++) printf "---|"
    print ""
    for (r = 1; r <= count; r++) {
      split(rows[r], k, SUBSEP)
      printf "| %s | %s |", k[1], k[2]
      for (c = 1; c <= cells; c++) printf " %d (%d) |", mid[rows[r], cell[c]], best[rows[r], cell[c]]
      print ""
    }
    compared = split("raw:null raw:rublk-loop raw:loop vhd:raw qcow2:raw qcow2:rublk-qcow2 qcow2:qemu-nbd-qcow2", pair, " ")
    print "\nRatios of the medians:\n"
    printf "| | queues |"
    for (c = 1; c <= cells; c++) printf " %s |", cell[c]
    printf "\n|---|---|"
    for (c = 1; c <= cells; c++) printf "---|"
    print ""
    for (queues = 1; queues <= most; queues++)
      for (p = 1; p <= compared; p++) {
        split(pair[p], k, ":")
        printf "| %s to %s | %d |", k[1], k[2], queues
        for (c = 1; c <= cells; c++)
          printf " %s |", ratio(mid[k[1], queues, cell[c]], mid[k[2], ((k[2], queues) in seen) ? queues : 1, cell[c]])
        print ""
      }
    print "\nTwo jobs to one:\n"
    print "| device | queues | randread | randwrite |\n|---|---|---|---|"
    for (r = 1; r <= count; r++) {
      split(rows[r], k, SUBSEP)
      printf "| %s | %s | %s | %s |\n", k[1], k[2], ratio(mid[rows[r], "randread-2"], mid[rows[r], "randread-1"]),
        ratio(mid[rows[r], "randwrite-2"], mid[rows[r], "randwrite-1"])
    }
  }' "$work/log"
exit "$mistakes"
