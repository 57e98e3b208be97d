"""Sessions over small models: random ones from transformers, and one that recites."""

import dataclasses
import itertools
import math
import pathlib
import pydoc

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.manager import make_metadata, write_params
from lemur_jax.infer.session import Session, make_session
from lemur_jax.models import llama
from lemur_jax.models.config import LlamaConfig
from lemur_jax.models.presets import preset
from lemur_jax.parallel.mesh import make_mesh, parse_mesh
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import extend, train_sentencepiece


def mesh_of(text: str):
    """`"fsdp=4,tensor=2"` over as many devices as it needs; "" is one device."""
    sizes = parse_mesh(text) | ({} if "fsdp" in text else {"fsdp": 1})
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory) -> Tokenizer:
    """500 SentencePiece pieces and ChatML's control tokens."""
    path = tmp_path_factory.mktemp("tokenizer")
    text = pathlib.Path(pydoc.__file__).read_text(encoding="utf-8")
    train_sentencepiece([text[:100_000]], path / "base", 500)
    return extend(path / "base", path / "chat", CHATML_TOKENS)


@pytest.fixture(scope="session")
def tiny_session() -> Session:
    """A random model of 512 ids on 4 devices, its logits spread out enough to sample from."""
    config = preset("tiny", max_position_embeddings=64)
    params = fresh_params(config)
    params["head"]["kernel"] *= 10
    return make_session(config, params, mesh_of("fsdp=2,tensor=2"), "float32")


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory, chat_tokenizer) -> pathlib.Path:
    """A random model with its tokenizer, its logits spread out."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    config = preset("tiny", vocab_size=chat_tokenizer.vocab_size)
    params = fresh_params(config)
    params["head"]["kernel"] *= 10
    write_params(
        path, params, make_metadata(model=config.to_dict(), tokenizer_files=chat_tokenizer.files()), step=1
    )
    return path


def fresh_params(config: LlamaConfig):
    return jax.jit(llama.init_params, static_argnums=0)(config, jax.random.key(0))


def recite(tokenizer: Tokenizer, ids: list[int], **changes) -> Session:
    """A model that says id after id of a chain and knows nothing else.

    Its layers add nothing; the head maps the embedding of each id to the next one. No id may occur
    twice in the chain.
    """
    assert len(set(ids)) == len(ids)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, **changes,
    )  # fmt: skip
    params = fresh_params(config)
    params = jax.tree.map(np.array, params)
    params["layers"]["attention"]["out"][:] = 0
    params["layers"]["mlp"]["down"][:] = 0
    embedding, head = params["embed"]["embedding"], params["head"]["kernel"]
    head[:] = 0
    for now, following in itertools.pairwise(ids):
        head[:, following] = embedding[now] / np.linalg.norm(embedding[now])
    return dataclasses.replace(make_session(config, params, mesh_of(""), "float32"), tokenizer=tokenizer)
