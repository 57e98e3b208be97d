"""The whole recipe through the console command, on eight virtual devices and a corpus of seconds.

What the quickstart does on real data: tokenizer, stores, base model, Hugging Face and back, code-heavy
pretraining, ChatML, chat tuning, export, and the exported model's tokens against transformers'.
"""

import json
import math

import jax
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemur_jax.cli import main
from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import load
from lemur_jax.parallel.mesh import parse_mesh
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.text.chat_template import CHATML_TOKENS, encode_chat
from lemur_jax.text.tokenizer import Tokenizer

TASKS = """
import json
import seqio
import tensorflow as tf

def documents(kind, split):
    held_out = split == "validation"
    for i in range(20 if held_out else 150):
        n = i + 1000 * held_out
        if kind == "code":
            yield {"text": f"def add_{n}(a, b):\\n    return a + b + {n}\\n" * 6}
        elif kind == "text":
            yield {"text": f"Chapter {n}. The quick brown fox number {n} jumps over the lazy dog. " * 6}
        else:
            turns = [("user", f"What is {n} plus 1?"), ("assistant", f"It is {n + 1}.")]
            yield {"messages": json.dumps([{"role": r, "content": c} for r, c in turns])}

def source(kind, content):
    def dataset(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_generator(
            lambda: ({**d, "id": f"{kind}-{i}"} for i, d in enumerate(documents(kind, split))),
            output_signature={k: tf.TensorSpec((), tf.string) for k in (content, "id")},
        )
    return seqio.FunctionDataSource(dataset, splits=("train", "validation"))

for kind, content in (("code", "text"), ("text", "text"), ("chat", "messages")):
    feature = seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0)
    seqio.TaskRegistry.add(f"recipe_{kind}", source=source(kind, content), output_features={content: feature})
"""

CONFIG = """
from lemur_jax.config import default_config
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.models.presets import preset

def get_config(stage):
    config = default_config(preset("tiny", vocab_size=405 if stage == "chat" else 400))
    config.compute.dtype = "float32"
    config.mesh.tensor = 2
    config.tokenizer.path = "tokenizer_chat" if stage == "chat" else "tokenizer"
    config.data.modules = ("recipe_tasks",)
    config.data.sequence_length = 128
    config.train.steps = 12
    config.train.batch_rows = 8
    config.optimizer.learning_rate = 1e-2
    config.eval.tasks = ("recipe_code", "recipe_text")
    config.log.every_steps = 5
    whole = {"packing": "concat", "max_epochs": 0.0}
    if stage == "base":
        config.tokenizer.train_vocab_size = 400
        config.tokenizer.train_tasks = ("recipe_code", "recipe_text")
        config.data.sources = {"recipe_text": {"share": 1.0, **whole}}
    elif stage == "lemur":
        config.init.checkpoint = "imported"
        config.data.sources = {"recipe_code": {"share": 10.0, **whole}, "recipe_text": {"share": 1.0, **whole}}
    else:
        config.init.checkpoint = "runs/lemur"
        config.init.new_rows = "mean"
        config.tokenizer.extend = "tokenizer"
        config.tokenizer.add_tokens = CHATML_TOKENS
        config.data.sources = {"recipe_chat": {"share": 1.0, "packing": "fit", "max_epochs": 0.0}}
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The directory in which every stage has run."""
    root = tmp_path_factory.mktemp("recipe")
    (root / "recipe_tasks.py").write_text(TASKS)
    (root / "config.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for words in (
            "prepare --config config.py:base --config.prepare.workers=1",
            "train --config config.py:base --workdir runs/base",
            "export-hf runs/base hf/base --dtype float32",
            "import-hf hf/base imported",
            "prepare --config config.py:lemur --config.prepare.workers=1",
            "train --config config.py:lemur --workdir runs/lemur",
            "prepare --config config.py:chat --config.prepare.workers=1",
            "train --config config.py:chat --workdir runs/chat",
            "export-hf runs/chat hf/chat --dtype float32",
            "report runs/base runs/lemur runs/chat --output report.html",
        ):
            assert main(words.split()) == 0, words
    return root


def bits_per_byte(root, stage, task):
    found = [r for r in read_metrics(root / "runs" / stage) if r["kind"] == "eval" and r["task"] == task]
    return found[-1]["bits_per_byte"]


def test_code_training_helps_code(recipe):
    assert bits_per_byte(recipe, "lemur", "recipe_code") < 0.8 * bits_per_byte(recipe, "base", "recipe_code")


def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_text(recipe):
    record = next(r for r in read_metrics(recipe / "runs/base") if r.get("task") == "recipe_text")
    documents = [
        f"Chapter {n}. The quick brown fox number {n} jumps over the lazy dog. " * 6
        for n in range(1000, 1020)
    ]
    assert record["bytes"] == sum(len(text.encode()) for text in documents)
    tokenizer = Tokenizer.load(recipe / "tokenizer")
    # Everything after bos is predicted, eos too.
    assert record["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in documents)
    assert record["bits_per_byte"] == pytest.approx(
        record["loss"] * record["tokens"] / math.log(2) / record["bytes"]
    )


def test_code_and_text_were_mixed_ten_to_one(recipe):
    rows = [r for r in read_metrics(recipe / "runs/lemur") if r["kind"] == "train"]
    assert sum("loss/recipe_text" in r for r in rows) == round(12 * 8 / 11)  # a text row in every 11


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_sharded_greedy_tokens_equal_transformers(recipe, mesh):
    session = load(recipe / "runs/chat", parse_mesh(mesh), "float32")
    tokenizer = session.tokenizer
    questions = [
        [{"role": "user", "content": text}] for text in ("What is 7 plus 1?", "def add(", "Hello 🐒")
    ]
    prompts = [encode_chat(tokenizer, question, add_generation_prompt=True)[0] for question in questions]
    ours = generate(session, prompts, max_new_tokens=24, stop_ids=())

    theirs = AutoModelForCausalLM.from_pretrained(recipe / "hf/chat", dtype=torch.float32)
    for prompt, completion in zip(prompts, ours, strict=True):
        inputs = torch.tensor([prompt])
        out = theirs.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(completion.tokens) == out[0, len(prompt) :].tolist()


def test_exported_directory_needs_nothing_of_ours(recipe):
    tokenizer = AutoTokenizer.from_pretrained(recipe / "hf/chat")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 plus 1?"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ours, _ = encode_chat(Tokenizer.load(recipe / "tokenizer_chat"), messages, add_generation_prompt=True)
    assert theirs == ours
    generation = json.loads((recipe / "hf/chat/generation_config.json").read_text())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end == 400 + CHATML_TOKENS.index("<|im_end|>")
    assert end in generation["eos_token_id"]


def test_smoke_verb_and_chat_verb(recipe, capsys):
    hf = str(recipe / "hf/chat")
    checkpoint = str(recipe / "runs/chat")
    assert jax.device_count() == 8
    assert main(["smoke", "--checkpoint", checkpoint, "--mesh", "fsdp=4,tensor=2", "--hf", hf]) == 0
    assert "equal transformers'" in capsys.readouterr().out
    assert (
        main(["chat", "--checkpoint", checkpoint, "--prompt", "What is 5 plus 1?", "--max-new-tokens", "8"])
        == 0
    )
    assert capsys.readouterr().out.endswith("\n")  # what a model of 12 updates says is its own affair


def test_a_hugging_face_directory_is_a_checkpoint_too(recipe, monkeypatch, tmp_path, capsys):
    """Trained from and generated from as it is, bit for bit what its import gives."""
    monkeypatch.chdir(recipe)
    words = ["train", "--config", "config.py:lemur", "--config.train.steps=3", "--config.eval.tasks=()"]
    losses = []
    for checkpoint in ("hf/base", "imported"):
        workdir = tmp_path / checkpoint
        assert main([*words, f"--config.init.checkpoint={checkpoint}", "--workdir", str(workdir)]) == 0
        losses.append([r["loss"] for r in read_metrics(workdir) if r["kind"] == "train"])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    capsys.readouterr()
    said = []
    for checkpoint in ("hf/chat", "runs/chat"):
        words = ["chat", "--checkpoint", checkpoint, "--prompt", "What is 5 plus 1?", "--max-new-tokens", "8"]
        assert main(words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["smoke", "--checkpoint", "hf/chat", "--mesh", "fsdp=4,tensor=2", "--hf", "hf/chat"]) == 0
    assert "equal transformers'" in capsys.readouterr().out


def test_smoke_says_where_another_model_differs(recipe, capsys):
    words = ["smoke", "--checkpoint", str(recipe / "runs/lemur"), "--hf", str(recipe / "hf/base")]
    assert main(words) == 2
    assert "the token at position" in capsys.readouterr().err


def test_everything_again_repeats_nothing(recipe, monkeypatch, capsys):
    monkeypatch.chdir(recipe)
    before = {
        path: path.stat().st_mtime_ns
        for path in recipe.rglob("*")
        if path.is_file() and "stores" in str(path) and path.name != "running.lock"
    }
    assert main(["prepare", "--config", "config.py:lemur", "--config.prepare.workers=1"]) == 0
    assert main(["train", "--config", "config.py:lemur", "--workdir", "runs/lemur"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_report_holds_every_stage(recipe):
    page = (recipe / "report.html").read_text()
    assert all(stage in page for stage in ("base", "lemur", "chat"))
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--config.init.new_rows=refuse", "--config.model.vocab_size=410"], "new_rows"),
        (["--config.model.hidden_size=32"], "hidden_size"),
        (["--config.model.vocab_size=404"], "at least as large"),
        (["--config.tokenizer.path=tokenizer_chat", "--config.data.sources.recipe_chat.share=-1.0"], "share"),
    ],
)
def test_stage_that_does_not_fit_the_one_before(recipe, monkeypatch, capsys, tmp_path, change, words):
    monkeypatch.chdir(recipe)
    assert main(["train", "--config", "config.py:chat", "--workdir", str(tmp_path / "run"), *change]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error


def test_store_of_another_tokenizer_is_refused(recipe, monkeypatch, capsys, tmp_path):
    """The base tokenizer cannot read the chat store, which has tokens that it does not know."""
    monkeypatch.chdir(recipe)
    words = ["train", "--config", "config.py:chat", "--workdir", str(tmp_path / "run")]
    assert main([*words, "--config.tokenizer.path=tokenizer"]) == 2
    assert "tokenizer" in capsys.readouterr().err
