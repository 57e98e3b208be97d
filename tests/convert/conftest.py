"""Small random models written by transformers itself."""

import dataclasses
import functools
import json
import pathlib

import pytest
import torch
import transformers

from lemur_jax.convert.import_hf import import_hf
from lemur_jax.text.tokenizer_files import train_sentencepiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfModel:
    """A model on disk and in memory."""

    path: pathlib.Path
    model: transformers.LlamaForCausalLM | transformers.MistralForCausalLM

    def state(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def edit_config(self, **changes) -> None:
        """Sets keys of config.json."""
        file = self.path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _make_model(
    path: pathlib.Path, dtype: torch.dtype = torch.float32, *, kind="Llama", shard="1GB", **changes
) -> HfModel:
    """A random Llama, or another `kind`, whose every tensor, norm scales too, has values of its own."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
    }
    config = getattr(transformers, f"{kind}Config")(**(shape | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
    model = model.to(dtype).eval()
    model.save_pretrained(path, max_shard_size=shard)
    return HfModel(path=path, model=model)


@pytest.fixture
def make_model(tmp_path):
    """`make_model(dtype, *, kind, shard, **config)` writes a model to `tmp_path / "hf"`."""
    return functools.partial(_make_model, tmp_path / "hf")


@pytest.fixture
def hf_model(make_model):
    return make_model()


@pytest.fixture
def checkpoint(hf_model, tmp_path):
    """An imported model without a tokenizer."""
    import_hf(hf_model.path, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A SentencePiece tokenizer of 400 pieces."""
    path = tmp_path_factory.mktemp("tokenizer")
    text = pathlib.Path(pathlib.__file__).read_text()
    train_sentencepiece(text.split("\n\n"), path, 400)
    return path
