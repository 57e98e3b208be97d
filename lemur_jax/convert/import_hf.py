"""Hugging Face directory -> our checkpoint."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.checkpoint.streaming import Streamed, write_params
from lemur_jax.cluster import hosts
from lemur_jax.common.errors import UserError
from lemur_jax.convert import layout
from lemur_jax.convert.directory import atomic_directory, check_target
from lemur_jax.convert.dtypes import copy_cast, numpy_dtype
from lemur_jax.convert.hf_config import read_config, read_json
from lemur_jax.convert.hf_weights import Tensor, open_checked
from lemur_jax.convert.vocabulary import NO_CHANGE, Change
from lemur_jax.models.config import DecoderConfig
from lemur_jax.text.gguf_files import is_gguf
from lemur_jax.text.tokenizer import GENERATION_CONFIG, read_files

logger = logging.getLogger(__name__)


def hf_tokenizer_files(hf_dir: epath.PathLike) -> dict[str, bytes]:
    """The tokenizer's files of a directory by name, and its `generation_config.json`; empty without a tokenizer.

    Without that file, `config.json` says which ids end an answer, as for transformers.
    """
    directory = epath.Path(hf_dir)
    if is_gguf(hf_dir):
        return read_files(hf_dir)
    if not any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        return {}
    files = read_files(hf_dir)
    if GENERATION_CONFIG not in files:
        stop = read_json(directory / "config.json").get("eos_token_id")
        files[GENERATION_CONFIG] = json.dumps({"eos_token_id": stop}).encode()
    return files


def load_hf_params(
    hf_dir: epath.PathLike,
    shardings: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    each: Callable[[str, jax.Array], Any] = lambda name, leaf: leaf,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a Hugging Face directory, local or gs://, into our parameter tree of `dtype`.

    Every name and shape is checked before the first weight is read. Each tensor is read once, and only the parts for
    this host's devices are copied: the host holds one tensor and its share of one parameter.

    Args:
      shardings: nested dict of shardings, one per parameter; None: NumPy arrays.
      each: function of the path and of a parameter on devices, applied as soon as the parameter is read.

    Raises UserError for a model that `hf_config` and `hf_weights` refuse, or a value that is not finite or does not fit
    `dtype`.
    """
    numpy_dtype(dtype)
    config = read_config(hf_dir)
    tensors = open_checked(config, hf_dir)
    if shardings is not None:
        hosts.agree("the Hugging Face model that is read", lambda: digest_of_rows(tensors))
    flat: dict[str, Any] = {}
    for weight in layout.weights(config):
        if shardings is None:
            block = _bounds((slice(None),) * len(weight.shape), weight.shape)
            flat[weight.path] = _load(weight, tensors, {block}, dtype)[block]
        else:
            sharding = flatten_dict(shardings, sep="/")[weight.path]
            flat[weight.path] = each(weight.path, _place(weight, tensors, sharding, dtype))
    return config, unflatten_dict(flat, sep="/")


def digest_of_rows(tensors: Mapping[str, Tensor]) -> str:
    """A digest of one row of each matrix: it tells models of one shape apart, e.g. two downloads of one name.

    Without the experts: models have up to tens of thousands of their matrices, each a request to an object store.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if len(tensor.shape) == 2 and ".experts." not in name:
            row = tensor.shape[0] // 2
            digest.update(tensor.rows(name, row, row + 1).read().tobytes())
    return digest.hexdigest()


# A block of an array: (start, stop) of each axis.
_Block = tuple[tuple[int, int], ...]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Block:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


def _place(weight: layout.Weight, tensors: Mapping[str, Tensor], sharding: Sharding, dtype: str) -> jax.Array:
    """One parameter with all layers on the devices of `sharding`."""
    indices = sharding.addressable_devices_indices_map(weight.shape)
    needed = {device: _bounds(index, weight.shape) for device, index in indices.items() if index is not None}
    blocks = _load(weight, tensors, set(needed.values()), dtype)
    shards = [jax.device_put(blocks[block], device) for device, block in needed.items()]
    return jax.make_array_from_single_device_arrays(weight.shape, sharding, shards)


def _load(
    weight: layout.Weight,
    tensors: Mapping[str, Tensor],
    needed: Collection[_Block],
    dtype: str,
    change: Change = NO_CHANGE,
) -> dict[_Block, np.ndarray]:
    """The wanted blocks of one parameter; refuses values that no checkpoint may hold."""
    blocks = {
        block: np.empty([stop - start for start, stop in block], numpy_dtype(dtype)) for block in needed
    }
    lead = len(weight.lead)
    for index, name in zip(np.ndindex(weight.lead), weight.names, strict=True):
        targets = [
            block
            for block in needed
            if all(start <= i < stop for i, (start, stop) in zip(index, block[:lead], strict=True))
        ]
        if not targets:
            continue
        stored = tensors[name].read()
        if name in layout.VOCABULARY:
            stored = change.resize(stored, weight.hf_shape[0])
        tensor = weight.from_hf(stored)
        for block in targets:
            position = tuple(i - start for i, (start, _) in zip(index, block[:lead], strict=True))
            target = blocks[block][(*position, ...)]
            copy_cast(target, tensor[tuple(slice(*bounds) for bounds in block[lead:])], tensors[name].name)
            if not np.isfinite(target).all():
                raise UserError(
                    f"{tensors[name].path}: weight {tensors[name].name} has values that are not finite: download it"
                    " again or repair it"
                )
    return blocks


def import_hf(
    hf_dir: epath.PathLike,
    ckpt_dir: epath.PathLike,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    change: Change = NO_CHANGE,
) -> DecoderConfig:
    """Writes a Hugging Face model as a checkpoint of parameters only, step 0, one tensor at a time.

    Args:
      hf_dir: directory with `config.json`, weights and tokenizer files if it has some, local or gs://.
      ckpt_dir: checkpoint directory to create, local or gs://; after an error nothing is left behind.
      dtype: of the parameters: "float32", "bfloat16" or "float16".
      overwrite: replace an earlier import at `ckpt_dir`.
      change: of the vocabulary.

    Returns:
      The shape of the model in the checkpoint.

    Raises:
      UserError: `ckpt_dir` exists, or as in `Change.apply` and `load_hf_params`.
    """
    numpy_dtype(dtype)
    source, target = epath.Path(hf_dir), epath.Path(ckpt_dir)
    # Only step 0, as an import writes it, is replaced, so that no training is ever deleted.
    check_target(target, overwrite, lambda path: all(child.name == "0" for child in path.iterdir()))
    stored = read_config(source)
    config, files = change.apply(stored, hf_tokenizer_files(source), source)
    tensors = open_checked(stored, source)
    params = {weight.path: _stream(weight, tensors, dtype, change) for weight in layout.weights(config)}
    metadata = make_metadata(model=config.to_dict(), tokenizer_files=files)
    with atomic_directory(target) as directory:
        write_params(directory, unflatten_dict(params, sep="/"), metadata)
    if not files:
        logger.info("without a tokenizer: %s has no tokenizer.json and no tokenizer.model", hf_dir)
    return config


def _stream(weight: layout.Weight, tensors: Mapping[str, Tensor], dtype: str, change: Change) -> Streamed:
    """One parameter, one layer at a time if it is stacked."""

    def read(layer: int) -> np.ndarray:
        block = tuple((0, size) for size in weight.shape)
        if weight.lead:
            block = ((layer, layer + 1), *block[1:])
        return _load(weight, tensors, {block}, dtype, change)[block]

    pieces = weight.lead[0] if weight.lead else 1
    return Streamed(shape=weight.shape, dtype=numpy_dtype(dtype), pieces=pieces, read=read)
