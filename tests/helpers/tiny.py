"""A tiny program, shared by tests."""

import functools
import math

import jax
import numpy as np

from lemur_jax.config import RunConfig, replace
from lemur_jax.models import decoder
from lemur_jax.models.presets import preset
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.train.state import shardings_of, start
from lemur_jax.train.step import build

ROWS, LENGTH, SOURCES = 16, 64, 2


TINY = {
    "compute.dtype": "float32",
    "compute.loss_chunk": 0,
    "train.batch_rows": ROWS,
    "train.steps": 10,
    "data.sequence_length": LENGTH,
    "optimizer.learning_rate": 1e-2,
    "optimizer.final_learning_rate": 1e-3,
    "optimizer.warmup_steps": 2,
}


def tiny_config(options=None, **model):
    """A run config of the preset "tiny"; `options` by dotted key, e.g. {"train.steps": 5}."""
    config = replace(RunConfig(model=preset("tiny", **model)), TINY)
    return replace(config, options or {})


def program_on(mesh_shape, config=None, objective=None):
    """The program on as many devices as the mesh has: (data, fsdp, sequence, tensor), or sizes by axis."""
    config = config or tiny_config()
    if not isinstance(mesh_shape, dict):
        mesh_shape = dict(zip(("data", "fsdp", "sequence", "tensor"), mesh_shape, strict=True))
    devices = jax.devices()[: math.prod(mesh_shape.values())]
    return build(config, make_mesh(mesh_shape, devices), SOURCES, objective)


@functools.cache
def _first_params(model):
    """Compiled once a model: most of the time of a test with a mesh of its own."""
    init = jax.jit(decoder.init_params, static_argnums=0)
    return jax.device_get(init(model, jax.random.key(0)))


def first_state(program):
    # A copy: a step may be given its memory.
    fresh = jax.tree.map(lambda leaf: leaf.astype(program.param_dtype), _first_params(program.model))
    params = jax.device_put(fresh, shardings_of(program.state.params))
    return start(params, program.optimizer, program.state)


def placed(batch, program):
    return {key: jax.device_put(value, program.batch[key].sharding) for key, value in batch.items()}


def rows():
    """Rows with very different numbers of targets, several documents in each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (ROWS, LENGTH + 1)).astype(np.int32)
    share = rng.random((ROWS, 1)) ** 3
    segments = np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1).astype(np.int32)
    starts = np.array([[np.argmax(row == segment) for segment in row] for row in segments])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (rng.random((ROWS, LENGTH)) < share).astype(np.float32),
        "segment_ids": segments,
        "positions": (np.arange(LENGTH) - starts).astype(np.int32),
        "source_ids": (np.arange(ROWS) % SOURCES).astype(np.int32),
    }
