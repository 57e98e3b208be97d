#!/usr/bin/env bash
# Lemur's recipe from scratch, on Python's standard library and documentation: tokenizer, data, a base Llama on text,
# code-heavy continued pretraining at 10 : 1, chat tuning, export to Hugging Face, sharded inference.
#
#   bash launch/quickstart_scratch.sh
#
# Writes to ./quickstart. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment .venv "[prepare]"
export LEMUR_RELAUNCH=1 # a stopped run ends with 75, which stops this script

runs=quickstart/runs

stage "1/8 tokenizer and data"
lemur prepare --config configs/quickstart_base.py
lemur prepare --config configs/quickstart_lemur.py
lemur prepare --config configs/quickstart_chat.py

stage "2/8 base: a small Llama on text, in place of Llama-2"
lemur train --config configs/quickstart_base.py --workdir $runs/base
[ -f quickstart/hf/base/config.json ] || lemur export-hf $runs/base quickstart/hf/base --dtype float32

stage "3/8 import the base from its Hugging Face directory"
[ -d quickstart/imported ] || lemur import-hf quickstart/hf/base quickstart/imported

stage "4/8 lemur: continued pretraining, code : text = 10 : 1"
lemur train --config configs/quickstart_lemur.py --workdir $runs/lemur

stage "5/8 chat: ChatML tokens added, tuned on conversations"
lemur train --config configs/quickstart_chat.py --workdir $runs/chat

stage "6/8 export to Hugging Face"
[ -f quickstart/hf/chat/config.json ] || lemur export-hf $runs/chat quickstart/hf/chat --dtype float32

stage "7/8 sharded inference on 8 virtual devices (fsdp 4 × tensor 2)"
compare=() # torch is large: compared with transformers only if torch is installed
if python -c "import torch" 2>/dev/null; then compare=(--hf quickstart/hf/chat); fi
lemur smoke --checkpoint $runs/chat --virtual-devices 8 --mesh fsdp=4,tensor=2 ${compare[@]+"${compare[@]}"}
question="What does Python's documentation say about the with statement?"
printf '\n> %s\n' "$question"
lemur chat --checkpoint $runs/chat --max-new-tokens 96 --repetition-penalty 1.2 --prompt "$question"

stage "8/8 report"
lemur report $runs/base $runs/lemur $runs/chat --output quickstart/report.html --table

stage "done"
cat <<'END'
quickstart/report.html     curves and the table of held-out bits per byte
quickstart/runs/*          metrics and checkpoints of the three stages
quickstart/hf/chat         the model for Hugging Face: AutoModelForCausalLM.from_pretrained("quickstart/hf/chat")
quickstart/stores/*        the token stores

Try next (after `source .venv/bin/activate`):
  lemur chat --checkpoint quickstart/runs/chat
  lemur inspect configs/quickstart_chat.py
  lemur generate --checkpoint quickstart/runs/lemur --prompt "def fibonacci(n):"
END
