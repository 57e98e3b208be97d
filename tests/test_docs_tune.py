"""docs/tune.md as it stands, on a small Llama that transformers wrote."""

import dataclasses
import json

import pytest
import transformers

from lemur_jax.common.errors import UserError
from lemur_jax.convert import start_config
from lemur_jax.convert.start_config import config_from_checkpoint
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.pages import run_page


@pytest.fixture(scope="module")
def walk(tmp_path_factory, chat_dir):
    """The directory in which every block of the page has run."""
    folder = tmp_path_factory.mktemp("tune")
    shape = {
        "vocab_size": Tokenizer.load(chat_dir).vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(folder / "my_model")
    for file in chat_dir.iterdir():
        (folder / "my_model" / file.name).write_bytes(file.read_bytes())
    talks = (
        [
            {"role": "user", "content": f"What is {i} plus 1?"},
            {"role": "assistant", "content": f"It is {i + 1}."},
        ]
        for i in range(200)
    )
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    run_page("tune.md", folder)
    return folder


def test_the_run_started_from_the_model_and_its_export_opens(walk):
    records = [json.loads(line) for line in (walk / "run/metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    assert sorted(losses) == list(range(1, 11))
    assert {record["step"] for record in records if record["kind"] == "eval"} == {0, 10}
    tuned = transformers.AutoModelForCausalLM.from_pretrained(walk / "tuned")
    assert tuned.config.vocab_size == 700 + len(CHATML_TOKENS)
    assert "It is" in (walk / "1.out").read_text()  # what `inspect` marks as trained


def test_a_run_is_a_start_too(walk, monkeypatch):
    monkeypatch.chdir(walk)
    joined = []
    monkeypatch.setattr(start_config.hosts, "join", lambda: joined.append("hosts"))
    config = config_from_checkpoint("run")
    assert joined == ["hosts"]  # before the checkpoint is read, which makes JAX's devices
    assert (config.init.checkpoint, config.tokenizer.path) == ("run", "my_model")
    assert config.model.num_hidden_layers == 2
    monkeypatch.setenv("HOME", str(walk))
    assert config_from_checkpoint("~/my_model").init.checkpoint == f"{walk}/my_model"
    assert joined == ["hosts"]


def test_the_template_of_a_run_and_a_tokenizer_of_the_hub_are_taken_over(walk, monkeypatch):
    monkeypatch.chdir(walk)
    of_the_run = start_config.open_source("run")
    options = {"path": "org/model", "chat_template": "own.jinja"}
    source = dataclasses.replace(of_the_run, run_config=of_the_run.run_config | {"tokenizer": options})
    monkeypatch.setattr(start_config, "open_source", lambda _: source)
    monkeypatch.setattr(
        start_config, "local_model", lambda name: {"org/model": str(walk / "my_model")}.get(name, name)
    )
    config = config_from_checkpoint("run")
    assert (config.tokenizer.path, config.tokenizer.chat_template) == ("org/model", "own.jinja")


def test_a_run_whose_tokenizer_has_gone_names_it(walk, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="tokenizer in my_model, which is not there"):
        config_from_checkpoint(walk / "run")
