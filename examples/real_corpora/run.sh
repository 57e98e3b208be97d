#!/usr/bin/env bash
# Continued pretraining of SmolLM2-135M-Instruct on code in six languages and on manuals, 10 : 1.
#
#   bash examples/real_corpora/run.sh          on a CPU: about an hour on 2 idle cores, 5 GB of memory
#   bash examples/real_corpora/run.sh gpu      20M tokens on one GPU
#   bash examples/real_corpora/run.sh sweep    "why 10 : 1?" on this model: six ratios (sweep_gpu: 20M tokens each)
#
# Arguments after the variant are passed to `lemur`, e.g. a small sweep_gpu on a CPU:
#
#   bash examples/real_corpora/run.sh sweep_gpu --config.compute.dtype=float32 --config.compute.loss_chunk=128 \
#     --config.train.{steps=4,batch_rows=1} --config.eval.{every_steps=2,max_rows=2} --config.optimizer.warmup_steps=1
#
# Needs Debian or Ubuntu with a current package index, and the quickstart's model: `bash launch/quickstart.sh`, up to its
# first stage.
set -euo pipefail
cd "$(dirname "$0")/../.."
variant=${1:-}
shift $(($# > 0))
here=examples/real_corpora
case $variant in "" | gpu | sweep | sweep_gpu) ;; *) echo "unknown variant $variant: write gpu, sweep, sweep_gpu, or nothing" >&2 && exit 2 ;; esac
if [ ! -f quickstart/smollm2/base/config.json ]; then
  echo "there is no quickstart/smollm2/base: run bash launch/quickstart.sh first" >&2
  exit 2
fi
source launch/environment.sh
make_environment .venv "[prepare,gguf,verify]"
config=$here/real.py${variant:+:$variant}

stage "1/3 corpora"
python $here/fetch.py corpora
stage "2/3 token stores"
overrides=()
for word in "$@"; do [[ $word == --config.* ]] && overrides+=("$word"); done
lemur prepare --config "$config" ${overrides[@]+"${overrides[@]}"}
stage "3/3 training"
if [[ $variant == sweep* ]]; then
  lemur sweep --config "$config" --workdir "real_corpora/$variant" --sources code,manuals --ratios 1:0,10:1,3:1,1:1,1:3,0:1 --seeds 1 "$@"
else
  workdir=real_corpora/${variant:-cpu}
  lemur train --config "$config" --workdir "$workdir" "$@"
  lemur report "$workdir" --output real_corpora/report.html --table
fi
stage "done"
