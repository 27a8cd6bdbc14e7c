#!/usr/bin/env bash
# A chain of ten layers merged into its base in one pass, beside `qemu-img commit -b BASE TOP` of the
# same data as qcow2.  Prints a table in Markdown: the shortest time of each in turn, the bytes that
# were written and those of the union of the layers.  Asserts nothing about time.
#
# Usage: benches/merge.sh [DIRECTORY [RUNS [GIB]]]
#
# DIRECTORY (default: a new one under target/) needs some four times GIB; RUNS is how often each tool
# runs (default 3); GIB is the size of the disk (default 4).
cd "$(dirname "$0")/.."
. benches/common.sh

layers=10
# Each layer has so many MiB of its own in each GiB, and the last 30 % of those of the one below.
share=$((1024 / layers))
overlap=$((share * 30 / 100))

# Makes `$work/FORMAT.0` to `.10`, each over the one before, and `.child` over the last.
make_chain() {
  local format=$1 layer part at from len below=
  for ((layer = 0; layer <= layers; layer++)); do
    if [ -z "$below" ]; then
      "$vdtool" create -q -f "$format" "$work/$format.0" "${gib}G"
    else
      "$vdtool" create -q -f "$format" -b "$below" -F "$format" "$work/$format.$layer"
      for ((part = 0; part < gib; part++)); do
        at=$((part * 1024 + (layer - 1) * share))
        from=$((layer > 1 ? at - overlap : at))
        len=$((at + share - from))
        echo "write -q -P $layer ${from}M ${len}M"
      done >"$work/lines"
      "$vdtool" io -q --script "$work/lines" "$work/$format.$layer"
    fi
    below=$format.$layer
  done
  "$vdtool" create -q -f "$format" -b "$below" -F "$format" "$work/$format.child"
}

# Copies of all: a commit has each layer record the state that the one below it comes to.
fresh() {
  local format=$1 layer
  for ((layer = 0; layer <= layers; layer++)); do
    cp --sparse=always "$work/$format.$layer" "$work/run/$format.$layer"
  done
  cp --sparse=always "$work/$format.child" "$work/run/$format.child"
  sync
}

best() {
  sort -n "$1" | head -1
}

begin "${1:-target}" "${2:-3}"
gib=${3:-4}
introduce "$layers layers over a base, $gib GiB, 30 % of each layer over the one below"
mkdir "$work/run"
echo
echo "| chain | vdtool s | qemu-img qcow2 s | ratio | written MiB | union MiB |"
echo "|---|---|---|---|---|---|"
make_chain qcow2
: >"$work/theirs.s"
for ((run = 0; run < runs; run++)); do
  fresh qcow2
  measured qemu-img commit -q -d -b "$work/run/qcow2.0" "$work/run/qcow2.$layers"
  echo "$seconds" >>"$work/theirs.s"
done
theirs=$(best "$work/theirs.s")
union=$((gib * layers * share))
for format in qcow2 vhd vhdx vdi vmdk; do
  [ "$format" = qcow2 ] || make_chain "$format"
  : >"$work/ours.s"
  for ((run = 0; run < runs; run++)); do
    fresh "$format"
    before=$(du -k "$work/run/$format.0" | cut -f1)
    (cd "$work/run" && "$vdtool" chain "$format.child" >/dev/null)
    # Layers keep what they have: the peer does not empty them either.
    measured "$vdtool" commit -q -b "$work/run/$format.0" -d "$work/run/$format.$layers"
    echo "$seconds" >>"$work/ours.s"
    after=$(du -k "$work/run/$format.0" | cut -f1)
  done
  ours=$(best "$work/ours.s")
  awk -v f="$format" -v a="$ours" -v b="$theirs" -v w="$(((after - before) / 1024))" -v u="$union" \
    'BEGIN { printf "| %s | %.3f | %.3f | %.2f | %d | %d |\n", f, a, b, a / b, w, u }'
  rm -f "$work/run"/* "$work/$format".*
done
