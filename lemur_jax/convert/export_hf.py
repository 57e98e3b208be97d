"""Our checkpoint -> Hugging Face directory that `transformers` opens without this package."""

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from lemur_jax.checkpoint.digest import RunningDigest
from lemur_jax.checkpoint.metadata import Damaged, tokenizer_files
from lemur_jax.checkpoint.reading import (
    chunk_slices,
    open_arrays,
    read_metadata,
    read_slices,
    suggest_other_steps,
)
from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import write_json
from lemur_jax.common.paths import absolute
from lemur_jax.convert import hf_config, layout
from lemur_jax.convert.directory import atomic_directory, check_target
from lemur_jax.convert.dtypes import copy_cast, numpy_dtype
from lemur_jax.convert.hf_weights import check_shapes
from lemur_jax.convert.model_card import model_card
from lemur_jax.convert.peft import adapter_of
from lemur_jax.convert.safetensors import INDEX, write_weights
from lemur_jax.convert.source import open_source
from lemur_jax.convert.verify import compare_logits, compare_tensors
from lemur_jax.convert.vocabulary import NO_CHANGE, Change
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import abstract_params
from lemur_jax.text.chat_template import CHATML_TEMPLATE, stop_ids
from lemur_jax.text.tokenizer import FILE_NAMES, GENERATION_CONFIG, Tokenizer

logger = logging.getLogger(__name__)
Tensors = Iterator[tuple[str, np.ndarray]]  # with Hugging Face's names
MAX_SHARD_BYTES = 5e9  # per safetensors file; a larger tensor gets its own
# The files of an export.
_WRITTEN = {*FILE_NAMES, INDEX, "README.md", "config.json", "generation_config.json", "model.safetensors"}
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def export_hf(
    ckpt_dir: epath.PathLike,
    hf_dir: epath.PathLike,
    *,
    dtype: str = "bfloat16",
    step: int | None = None,
    overwrite: bool = False,
    change: Change = NO_CHANGE,
    verify: bool = False,
) -> DecoderConfig:
    """Writes safetensors, configs, tokenizer, chat template and model card.

    Weights go from checkpoint to file one tensor at a time; one chunk of layers of the checkpoint is in memory. An
    adapter is merged into its base first, in memory.

    Args:
      ckpt_dir: checkpoint directory or workdir, local or gs://.
      hf_dir: the directory to create, local or gs://; after an error nothing is left behind.
      dtype: of the written weights: "float32", "bfloat16" or "float16".
      step: which checkpoint; None: the newest.
      overwrite: replace an earlier export at `hf_dir`.
      change: of the vocabulary.
      verify: read the files again, compare them with the checkpoint (`convert.verify`), and log the result.

    Returns:
      The shape of the written model.

    Raises:
      UserError: no such checkpoint, `hf_dir` exists, a parameter is missing, unexpected, damaged or of another shape,
        a value does not fit `dtype`, vocabulary and tokenizer do not fit each other, or the written files differ.
    """
    numpy_dtype(dtype)
    target = epath.Path(hf_dir)
    check_target(target, overwrite, _is_export)
    metadata = read_metadata(ckpt_dir, step)
    if adapter_of(metadata) and absolute(metadata["config"]["init"]["checkpoint"]) == absolute(target):
        raise UserError(f"{target} is the base of the adapter in {ckpt_dir}: choose another directory")
    config, tokenizer, tensors = _open(ckpt_dir, metadata, change, dtype)
    with suggest_other_steps(ckpt_dir, metadata["step"]), atomic_directory(target) as directory:
        shapes = {name: weight.hf_shape for weight in layout.weights(config) for name in weight.names}
        write_weights(directory, shapes, dtype, _ahead(tensors()), MAX_SHARD_BYTES)
        card = model_card(config, metadata, dtype, chatml=_has_chatml(tokenizer))
        (directory / "README.md").write_text(card)
        _write_files(directory, config, dtype, tokenizer)
        if verify:
            logger.info("%s", compare_tensors(directory, config, tensors()))
            logger.info("%s", compare_logits(directory, config, tokenizer))
    return config


def _open(
    ckpt_dir: epath.PathLike, metadata: dict[str, Any], change: Change, dtype: str
) -> tuple[DecoderConfig, Tokenizer | None, Callable[[], Tensors]]:
    """The model and the tokenizer that are written, and a function that reads the tensors, in the table's order."""
    stored = DecoderConfig.from_dict(metadata["model"])
    read = _reader(ckpt_dir, metadata, stored)
    files = tokenizer_files(metadata)
    if unknown := sorted(files.keys() - {*FILE_NAMES, GENERATION_CONFIG}):
        raise UserError(f"{ckpt_dir}: {unknown[0]!r} among the tokenizer's files is not a tokenizer file")
    written, files = change.apply(stored, files, ckpt_dir)

    def tensors() -> Tensors:
        for weight, target in zip(layout.weights(stored), layout.weights(written), strict=True):
            for name, value in read(weight):
                tensor = np.empty(target.hf_shape, numpy_dtype(dtype))
                if name in layout.VOCABULARY:
                    value = change.resize(value, len(tensor))
                copy_cast(tensor, value, name)
                yield name, tensor

    return written, Tokenizer.from_files(files) if files else None, tensors


def _reader(
    ckpt_dir: epath.PathLike, metadata: dict[str, Any], model: DecoderConfig
) -> Callable[[layout.Weight], Tensors]:
    """Weight -> its tensors; an adapter is merged into its base first, with the whole model in this host's memory."""
    if adapter_of(metadata):
        host = SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda leaf: leaf.update(sharding=host), abstract_params(model))
        source = open_source(ckpt_dir, metadata["step"])
        params = flatten_dict(source.restore(abstract, lambda _, leaf: jax.device_get(leaf)), sep="/")
        return lambda weight: zip(
            weight.names, map(weight.to_hf, weight.parts(params[weight.path])), strict=True
        )
    leaves = metadata["leaves"]["params"]
    arrays = open_arrays(ckpt_dir, metadata["step"], leaves)
    where = f"checkpoint {ckpt_dir}, step {metadata['step']}: parameter"
    expected = {weight.path: weight.shape for weight in layout.weights(model)}
    check_shapes(expected, {path: array.shape for path, array in arrays.items()}, where)
    return lambda weight: read_parameter(
        arrays[weight.path], weight, leaves[weight.path].digest, f"{where} {weight.path}"
    )


def read_parameter(array: ts.TensorStore, weight: layout.Weight, digest: str, where: str) -> Tensors:
    """(name, tensor) of all layers of a stored parameter, one chunk of layers at a time.

    Raises Damaged after the last tensor if its digest differs from `digest`, that of the saved one.
    """
    running = RunningDigest()
    cuts = chunk_slices(array) if weight.lead else [...]
    blocks = read_slices(array, cuts, where)
    layers = (layer for block in blocks for layer in weight.parts(block))
    with ThreadPoolExecutor(1) as pool:  # NumPy releases the GIL: digest and cast run side by side
        for name, layer in zip(weight.names, layers, strict=True):
            future = pool.submit(running.update, layer)
            yield name, weight.to_hf(layer)
            future.result()
    if running.value != digest:
        raise Damaged(f"{where} is damaged: it is not what was saved")


def _is_export(directory: epath.Path) -> bool:
    """Whether the directory holds files of an export and no others."""
    names = {child.name for child in directory.iterdir()}
    foreign = {name for name in names if name not in _WRITTEN and not _SHARD.fullmatch(name)}
    return not names or ("config.json" in names and not foreign)


def _has_chatml(tokenizer: Tokenizer | None) -> bool:
    return tokenizer is not None and "<|im_end|>" in tokenizer.control_tokens


def _write_files(
    directory: epath.Path, config: DecoderConfig, dtype: str, tokenizer: Tokenizer | None
) -> None:
    """Writes the tokenizer's files, `generation_config.json` and `config.json`."""
    files = tokenizer.files() if tokenizer else {}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    if tokenizer is not None and _has_chatml(tokenizer) and tokenizer.chat_template is None:
        (directory / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    bos, eos, pad = (getattr(tokenizer, f"{kind}_id", None) for kind in ("bos", "eos", "pad"))
    stops = stop_ids(tokenizer) if tokenizer else ()
    ids = {"bos_token_id": bos, "eos_token_id": stops if len(stops) > 1 else eos, "pad_token_id": pad}
    write_json(directory / "generation_config.json", ids | {"do_sample": False})
    # Last: without it the directory is no model.
    config_json = hf_config.to_hf(config, dtype=dtype, bos=bos, eos=eos, pad=pad)
    write_json(directory / "config.json", config_json)
    if tokenizer is not None and Tokenizer.load(directory).digest != tokenizer.digest:
        logger.warning(
            "AutoTokenizer takes the tokenizer class of a %s here, not that of tokenizer_config.json: load this"
            " tokenizer with PreTrainedTokenizerFast.from_pretrained",
            config_json["model_type"],
        )


def _ahead(tensors: Tensors) -> Tensors:
    """The same tensors; the next is made in a thread while the caller writes the last."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, tensors, None)
        while (tensor := pending.result()) is not None:
            pending = pool.submit(next, tensors, None)
            yield tensor
