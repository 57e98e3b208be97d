#!/usr/bin/env bash
# The results of docs/harmony.md once more, from nothing: which mixture of code and text gives what at the quickstart's
# scale, how warm to train on, when to show the text, HumanEval, and the agents' episodes of the chat model. 2 to 3 hours
# on 2 busy cores after installation; each part says how long it takes there (1.6 s an update).
#
#   bash benchmarks/results.sh
#   RESULTS=/tmp/results SEEDS=1 STEPS=20 LIMIT=2 bash benchmarks/results.sh      # whether it runs: minutes, figures worthless
#
# Runs go to ./quickstart, results to docs/harmony. Started again, it resumes: finished runs
# are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment .venv "[prepare,eval]"
export PATH="$PWD/.venv/bin:$PATH" TF_CPP_MIN_LOG_LEVEL=3
export LEMUR_RELAUNCH=1 # a sweep that was told to stop ends with 75, and the parts after it do not begin
results=${RESULTS:-docs/harmony}
steps=${STEPS:-} seeds=${SEEDS:-} limit=${LIMIT:-}
at="quickstart/results${steps:+-$steps}${seeds:+-$seeds}${limit:+-$limit}"
mkdir -p "$at" "$results"

# part NAME MINUTES: what begins, and how long it takes where nothing of it is finished and no number is reduced.
part() { printf '\n=== %s: about %s min from nothing  [%d min so far]\n' "$1" "$2" $((SECONDS / 60)); }

part "1/7 quickstart, the models" 20
if [ -d quickstart/runs/chat/checkpoints/150 ]; then echo "finished already"; else bash launch/quickstart_scratch.sh; fi

# sweep DIR STEPS SEEDS ARGUMENT...: a sweep of its own, and what it leaves behind for people.
sweep() {
  local name=$1 count=${steps:-$2} runs=${seeds:-$3}
  lemur sweep --workdir "$at/sweep-$name" --seeds "$runs" "${@:4}" --config.train.steps="$count" \
    --config.checkpoint.every_steps=$((count / 2)) --config.checkpoint.keep=1
  mkdir -p "$results/$name"
  cp "$at/sweep-$name"/{table.md,results.json,pareto.svg,index.html} "$results/$name/"
  [ ! -f "$at/sweep-$name/law.svg" ] || cp "$at/sweep-$name/law.svg" "$results/$name/"
}

part "2/7 ratios of code and text: 6 mixtures, ${seeds:-3} seeds, ${steps:-100} updates; 7 merges" 70
sweep ratio 100 3 --config configs/quickstart_lemur.py --ratios 1:0,10:1,3:1,1:1,1:3,0:1 \
  --merge linear:0.5,arithmetic:0.5 --config.optimizer.warmup_steps=10
part "3/7 how warm to train on: 6 settings, ${seeds:-2} seeds, ${steps:-60} updates" 25
sweep rewarm 60 2 --config configs/quickstart_lemur.py \
  --vary optimizer.learning_rate=3e-4,1e-3,3e-3 --vary optimizer.warmup_steps=0,10 --config.eval.max_rows=200
part "4/7 more text at the end: 2 mixtures, ${seeds:-2} seeds, ${steps:-60} updates" 8
last_fifth=$((${steps:-60} * 4 / 5))
sweep anneal 60 2 --config configs/quickstart_lemur.py:annealed --vary data.stages.anneal.step=$last_fifth \
  --vary data.stages.anneal.shares.python_docs=10,100 --config.eval.max_rows=200 --config.optimizer.warmup_steps=10
part "5/7 as much text all along: 1 mixture, ${seeds:-2} seeds, ${steps:-60} updates" 4
sweep constant 60 2 --config configs/quickstart_lemur.py --ratios 4.8:1 \
  --config.eval.max_rows=200 --config.optimizer.warmup_steps=10

# evaluate NAME ARGUMENT...: the JSON gets its name when all is done, for an evaluation that stops early writes one as well.
evaluate() {
  if [ -f "$at/$1.json" ]; then
    echo "finished already"
    return
  fi
  lemur eval "${@:2}" --json "$at/$1.part.json" | tee "$at/$1.txt"
  mv "$at/$1.part.json" "$at/$1.json"
}

part "6/7 HumanEval: ${limit:-164} problems" 5
evaluate humaneval --checkpoint quickstart/runs/lemur --tasks humaneval ${limit:+--limit "$limit"}
part "7/7 agents: at most ${limit:-10} episodes of each of 4 kinds" 5
evaluate agents --checkpoint quickstart/runs/chat --agents python,sql,bash,tools --limit "${limit:-10}" --turns 3 \
  --max-new-tokens 64 --html "$at/agents.html"
cp "$at"/{humaneval.txt,agents.txt,agents.json,agents.html} "$results/"
printf '\n=== done, in %d min: %s\n' $((SECONDS / 60)) "$results"
