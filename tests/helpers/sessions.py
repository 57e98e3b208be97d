"""Sessions over small models: random ones, and one that recites."""

import itertools
import math

import jax
import numpy as np

from lemur_jax.infer.session import Session, make_session
from lemur_jax.models import decoder
from lemur_jax.models.config import DecoderConfig
from lemur_jax.parallel.mesh import make_mesh, parse_mesh
from lemur_jax.text.tokenizer import Tokenizer

# One shape for every tokenizer of the tests, so that prefill and decode are compiled once.
RECITER = DecoderConfig(
    vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=96,
)  # fmt: skip


def mesh_of(text: str):
    """`"fsdp=4,tensor=2"` over as many devices as it needs; "" is one device."""
    sizes = parse_mesh(text) | ({} if "fsdp" in text else {"fsdp": 1})
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def fresh_params(config: DecoderConfig):
    return jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))


def recite(tokenizer: Tokenizer, ids: list[int]) -> Session:
    """A model that says id after id of a chain and knows nothing else.

    Its layers add nothing; the head maps the embedding of each id to the next one. No id may occur twice in the chain.
    """
    assert len(set(ids)) == len(ids)
    params = jax.tree.map(np.array, fresh_params(RECITER))
    params["layers"]["attention"]["out"][:] = 0
    params["layers"]["mlp"]["down"][:] = 0
    embedding, head = params["embed"]["embedding"], params["head"]["kernel"]
    head[:] = 0
    for now, following in itertools.pairwise(ids):
        head[:, following] = embedding[now] / np.linalg.norm(embedding[now])
    return make_session(RECITER, params, mesh_of(""), "float32", tokenizer=tokenizer)
