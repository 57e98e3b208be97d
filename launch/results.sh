#!/usr/bin/env bash
# The results of docs/harmony.md once more, from nothing: which mixture of code and text gives what at the quickstart's
# scale, HumanEval, and the agents' episodes of the chat model. About 2 hours on 2 cores after installation.
#
#   bash launch/results.sh
#
# Runs go to ./quickstart, results to docs/harmony. Stopped and started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment .venv "[eval]"
export PATH="$PWD/.venv/bin:$PATH" TF_CPP_MIN_LOG_LEVEL=3
results=docs/harmony

[ -d quickstart/runs/chat/checkpoints/150 ] || bash launch/quickstart.sh

lemur sweep --config configs/quickstart_lemur.py --workdir quickstart/sweep \
  --ratios 1:0,10:1,3:1,1:1,1:3,0:1 --seeds 3 --merge linear:0.5,arithmetic:0.5 \
  --config.train.steps=100 --config.optimizer.warmup_steps=10 \
  --config.checkpoint.every_steps=50 --config.checkpoint.keep=1
mkdir -p $results
cp quickstart/sweep/{table.md,results.json,pareto.svg,index.html} $results/

lemur eval --checkpoint quickstart/runs/lemur --tasks humaneval --max-new-tokens 128 |
  tee $results/humaneval.txt
lemur eval --checkpoint quickstart/runs/chat --agents python,sql,bash,tools --limit 10 --turns 3 \
  --max-new-tokens 128 --json $results/agents.json --html $results/agents.html | tee $results/agents.txt
