#!/usr/bin/env bash
# The results of docs/harmony.md once more, from nothing: which mixture of code and text gives what at the quickstart's
# scale, how warm to train on, when to show the text, HumanEval, and the agents' episodes of the chat model. About 3 hours
# on 2 cores after installation.
#
#   bash launch/results.sh
#   RESULTS=/tmp/results SEEDS=1 STEPS=20 LIMIT=2 bash launch/results.sh      # whether it runs: minutes, figures worthless
#
# Runs go to ./quickstart, results to docs/harmony. Stopped and started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment .venv "[eval]"
export PATH="$PWD/.venv/bin:$PATH" TF_CPP_MIN_LOG_LEVEL=3
results=${RESULTS:-docs/harmony}
steps=${STEPS:-} seeds=${SEEDS:-} limit=${LIMIT:-}
at="quickstart/results${steps:+-$steps}${seeds:+-$seeds}${limit:+-$limit}"
mkdir -p "$at" "$results"

[ -d quickstart/runs/chat/checkpoints/150 ] || bash launch/quickstart.sh

# sweep DIR STEPS SEEDS ARGUMENT...: a sweep of its own, and what it leaves behind for people.
sweep() {
  local name=$1 count=${steps:-$2} runs=${seeds:-$3}
  lemur sweep --workdir "$at/sweep-$name" --seeds "$runs" "${@:4}" --config.train.steps="$count" \
    --config.checkpoint.every_steps=$((count / 2)) --config.checkpoint.keep=1
  mkdir -p "$results/$name"
  cp "$at/sweep-$name"/{table.md,results.json,pareto.svg,index.html} "$results/$name/"
}

sweep ratio 100 3 --config configs/quickstart_lemur.py --ratios 1:0,10:1,3:1,1:1,1:3,0:1 \
  --merge linear:0.5,arithmetic:0.5 --config.optimizer.warmup_steps=10
sweep rewarm 60 2 --config configs/quickstart_lemur.py \
  --vary optimizer.learning_rate=3e-4,1e-3,3e-3 --vary optimizer.warmup_steps=0,10 --config.eval.max_rows=200
last_fifth=$((${steps:-60} * 4 / 5))
sweep anneal 60 2 --config configs/quickstart_lemur.py:annealed --vary data.stages.anneal.step=$last_fifth \
  --vary data.stages.anneal.shares.python_docs=10,100 --config.eval.max_rows=200 --config.optimizer.warmup_steps=10
sweep constant 60 2 --config configs/quickstart_lemur.py --ratios 4.8:1 \
  --config.eval.max_rows=200 --config.optimizer.warmup_steps=10

[ -f "$at/humaneval.json" ] ||
  lemur eval --checkpoint quickstart/runs/lemur --tasks humaneval ${limit:+--limit "$limit"} \
    --json "$at/humaneval.json" | tee "$at/humaneval.txt"
[ -f "$at/agents.json" ] ||
  lemur eval --checkpoint quickstart/runs/chat --agents python,sql,bash,tools --limit "${limit:-10}" --turns 3 \
    --max-new-tokens 64 --html "$at/agents.html" --json "$at/agents.json" | tee "$at/agents.txt"
cp "$at"/{humaneval.txt,agents.txt,agents.json,agents.html} "$results/"
