#!/usr/bin/env bash
# Makes use of a GPU that is there for a limited time, for example 40 minutes:
#
#     bash benchmarks/gpu.sh 40          # DRY=1 only prints the commands
#
# In this order: the speed cases of `robsparse bench` (5 minutes), the tests that need a GPU, training
# of the networks of config/cifar10_gpu.yaml, attacks on them. It needs data/cifar10-jpeg.tar.xz and an
# installed robsparse, but no Snakemake. When the time is over, a network in training saves its state.
# Another call goes on, also on another machine: copy results/cifar10_gpu/ there first.
# Written: results/gpu/ (speed, logs) and results/cifar10_gpu/ (weights, records, partial report).
set -u
cd "$(dirname "$0")/.."
minutes=${1:?expected the number of minutes}
study=config/cifar10_gpu.yaml root=results/cifar10_gpu logs=results/gpu
python=${PYTHON:-python} reserve=60 # seconds for the report at the end
[ -n "${DRY:-}" ] || mkdir -p $logs

# run SECONDS NAME COMMAND...: at most this long, and never longer than the time that is left.
run() {
  local most=$1 name=$2 left=$((60 * minutes - reserve - SECONDS))
  shift 2
  [ $left -lt 10 ] && return
  [ "$most" -gt $left ] && most=$left
  echo "== $name (at most $most s): $*"
  [ -n "${DRY:-}" ] && return
  timeout --signal=TERM --kill-after=60 "$most" "$@" > "$logs/$name.log" 2>&1
  echo "   exit code $? after $SECONDS s; the end of $logs/$name.log:"
  tail -n 3 "$logs/$name.log"
}

for case in train perturb rewire evaluate; do
  [ -e $logs/$case.json ] || run 75 "bench_$case" "$python" -m robsparse bench $case \
    --arch resnet18 --batch-size 128 --images 64 --device cuda --json $logs/$case.json
done
[ -e $logs/tests.log ] || run 180 tests "$python" -m pytest tests -k "gpu or graph or cuda"
cells="dense/at/s0.0000 bcs/at/s0.9900 hydra/at/s0.9900 lwm/at/s0.9900"
for part in $cells; do
  cell=cifar10_jpeg/resnet18/$part/seed0
  [ -e $root/models/$cell/training.json ] ||
    run 7200 "train_${part%%/*}" "$python" -m robsparse train $study --cell $cell
done
for part in $cells; do
  cell=cifar10_jpeg/resnet18/$part/seed0
  [ -e $root/evaluations/$cell/best_val.json ] || run 7200 "attack_${part%%/*}" \
    "$python" -m robsparse evaluate $study --cell $cell --selection best_val
done
reserve=0
run 60 collect "$python" -m robsparse collect $study --partial
run 60 figures "$python" -m robsparse figures $study --partial
