"""Adapters as PEFT directories (`adapter_config.json`, `adapter_model.safetensors`), and merged into their base.

Axis legend: I inputs of a projection, O its outputs, R rank. PEFT's `lora_A.weight` is [R, I], `lora_B.weight` [O, R].
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from lemur_jax.checkpoint.metadata import tokenizer_files
from lemur_jax.checkpoint.reading import read_metadata, restore_params
from lemur_jax.common.errors import UserError
from lemur_jax.common.hub import hub_name, local_model
from lemur_jax.common.json_files import write_json
from lemur_jax.common.sections import from_plain
from lemur_jax.convert import layout
from lemur_jax.convert.directory import atomic_directory, check_target
from lemur_jax.convert.dtypes import copy_cast, numpy_dtype
from lemur_jax.convert.hf_config import ADAPTER_CONFIG, read_config, read_json
from lemur_jax.convert.hf_weights import check_shapes, open_weights
from lemur_jax.convert.safetensors import read_header, write_weights
from lemur_jax.models import lora
from lemur_jax.models.config import AdapterConfig, DecoderConfig
from lemur_jax.models.decoder import Params
from lemur_jax.parallel.rules import with_shardings
from lemur_jax.text.tokenizer import FILE_NAMES, GENERATION_CONFIG

WEIGHTS = "adapter_model.safetensors"
# Values of `init_lora_weights` with which peft leaves the base as it is; PiSSA, OLoRA and others subtract from it.
_KEEP_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def adapter_of(metadata: Mapping[str, Any]) -> AdapterConfig | None:
    """The adapter that a checkpoint's metadata says it holds; None: it holds a whole model."""
    plain = (metadata.get("config") or {}).get("adapter", {})
    return from_plain(AdapterConfig, plain) if plain.get("rank") else None


def _names(options: AdapterConfig, model: DecoderConfig) -> dict[str, list[str]]:
    """PEFT's tensors of each leaf of the adapter, one a layer."""
    weights = {weight.path: weight for weight in layout.weights(model)}
    return {
        f"{path}/{factor}": [
            f"base_model.model.{name.removesuffix('.weight')}.lora_{factor.upper()}.weight"
            for name in weights[path].names
        ]
        for path in lora.targets(options, model)
        for factor in "ab"
    }


def _matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """[R, I] or [O, R] of one layer."""
    sizes = shape[path.startswith("layers/") :]
    return (
        (sizes[-1], int(np.prod(sizes[:-1]))) if path.endswith("/a") else (int(np.prod(sizes[1:])), sizes[0])
    )


def read_peft(options: AdapterConfig, model: DecoderConfig, dtype: str) -> Params:
    """The adapter of a PEFT directory, `options.checkpoint`, as NumPy arrays.

    Raises UserError: it is missing, of another kind than LoRA, or differs from the config in rank, scale or targets.
    """
    directory = epath.Path(options.checkpoint)
    if not (directory / WEIGHTS).exists():
        raise UserError(f"config.adapter.checkpoint {directory} has no {WEIGHTS}: it is no PEFT adapter")
    stored = read_json(directory / ADAPTER_CONFIG)
    wants, other = "config.adapter wants", "only plain LoRA of one rank and one alpha is possible"
    empty = "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "alora_invocation_tokens"
    for key, accepted, reason in (
        ("r", stored.get("r") == options.rank, f"{wants} rank {options.rank}"),
        ("lora_alpha", stored.get("lora_alpha") == options.alpha, f"{wants} alpha {options.alpha}"),
        ("use_rslora", stored.get("use_rslora", False) == options.rslora, f"{wants} rslora {options.rslora}"),
        ("init_lora_weights", stored.get("init_lora_weights") in _KEEP_BASE,
         "peft changes the base with it: save the adapter with path_initial_model_for_weight_conversion"),
        *((key, not stored.get(key), other) for key in empty),
    ):  # fmt: skip
        if not accepted:
            raise UserError(f"{directory / ADAPTER_CONFIG} has {key} {stored.get(key)!r:.100}: {reason}")
    tensors = read_header(directory / WEIGHTS)
    abstract = flatten_dict(lora.abstract_adapter(options, model, dtype), sep="/")
    names = _names(options, model)
    expected = {
        name: _matrix_shape(path, abstract[path].shape) for path, each in names.items() for name in each
    }
    where = f"{directory} for config.adapter.targets {', '.join(options.targets)}: tensor"
    check_shapes(expected, {name: tensor.shape for name, tensor in tensors.items()}, where)
    flat = {}
    for path, each in names.items():
        array = np.stack([tensors[name].read().astype(numpy_dtype(dtype)).T for name in each])
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"{directory / WEIGHTS}: {each[0]} or its like has values that are not finite")
        flat[path] = array.reshape(abstract[path].shape)
    return unflatten_dict(flat, sep="/")


def export_peft(
    ckpt_dir: epath.PathLike,
    peft_dir: epath.PathLike,
    *,
    dtype: str = "float32",
    step: int | None = None,
    overwrite: bool = False,
) -> DecoderConfig:
    """Writes the adapter of a checkpoint as a directory that `peft` loads, with the tokenizer's files.

    Arguments as of `export_hf`. Raises UserError if the checkpoint holds no adapter, or `peft_dir` exists.
    """
    target = epath.Path(peft_dir)
    allowed = {ADAPTER_CONFIG, WEIGHTS, *FILE_NAMES, GENERATION_CONFIG}
    check_target(target, overwrite, lambda path: {child.name for child in path.iterdir()} <= allowed)
    metadata = read_metadata(ckpt_dir, step)
    options, model = adapter_of(metadata), DecoderConfig.from_dict(metadata["model"])
    if options is None:
        raise UserError(f"{ckpt_dir} holds no adapter: leave --adapter out")
    abstract = lora.abstract_adapter(options, model, metadata["config"]["compute"]["param_dtype"])
    adapter = flatten_dict(jax.device_get(restore_params(ckpt_dir, abstract, metadata["step"])), sep="/")
    tensors = {}
    for path, names in _names(options, model).items():
        leaf = adapter[path] if path.startswith("layers/") else adapter[path][None]
        for name, layer in zip(names, leaf, strict=True):
            matrix = layer.reshape(_matrix_shape(path, adapter[path].shape)[::-1]).T
            tensors[name] = np.empty(matrix.shape, numpy_dtype(dtype))
            copy_cast(tensors[name], matrix, name)
    base = metadata["config"]["init"]["checkpoint"]
    _check_base(base, model, tensors)
    base, revision = hub_name(base) or (base, None)
    modules = sorted({name.split(".")[-3] for name in tensors})
    adapter_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": options.rank, "lora_alpha": options.alpha,
        "lora_dropout": options.dropout, "use_rslora": options.rslora, "target_modules": modules, "bias": "none",
        "base_model_name_or_path": base, "revision": revision, "inference_mode": True,
    }  # fmt: skip
    with atomic_directory(target) as directory:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        write_weights(directory, shapes, dtype, iter(tensors.items()), np.inf)
        (directory / "model.safetensors").rename(directory / WEIGHTS)
        for name, content in tokenizer_files(metadata).items():
            (directory / name).write_bytes(content)
        write_json(directory / ADAPTER_CONFIG, adapter_config)
    return model


def _check_base(base: str, model: DecoderConfig, tensors: Collection[str]) -> None:
    """Raises UserError if `peft` would compute something else, where the base is a Hugging Face model that can be read:
    weights have other names there, or the run changed the rotary embedding.
    """
    try:
        directory = local_model(base, download=False)
        weights, base_config = open_weights(directory), read_config(directory).to_dict()
    except UserError:  # one of our checkpoints, or it is not here
        return
    for key, value in model.to_dict().items():
        if key.startswith("rope_") and value != base_config[key]:
            raise UserError(
                f"{base} has {key} {base_config[key]}, the run {value}, and peft would take that of the base: leave"
                " --adapter out"
            )
    names = (name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight" for name in tensors)
    if missing := sorted(set(names) - weights.keys()):
        raise UserError(
            f"{base} has no tensor {missing[0]}, so peft would leave out the adapter's: leave --adapter out, or train"
            " on a base that lemur export-hf has written"
        )


def merge_into(
    path: epath.PathLike, metadata: Mapping[str, Any], options: AdapterConfig, wanted: Params
) -> Callable[[str, Any], Any]:
    """A function of a base parameter's path and array, which gives it with the update of the adapter at `path`.

    `wanted` are the abstract parameters of the model, whose shardings the result has.
    """
    model = DecoderConfig.from_dict(metadata["model"])
    abstract = lora.abstract_adapter(options, model, "float32")
    leaves = flatten_dict(wanted, sep="/")
    sharding = next(iter(leaves.values())).sharding
    if isinstance(sharding, NamedSharding):
        abstract = with_shardings(sharding.mesh, abstract, lora.logical_axes(options, model))
    flat = flatten_dict(restore_params(path, abstract, metadata["step"]), sep="/")

    def merge_leaf(name: str, leaf: Any) -> Any:
        if f"{name}/a" not in flat:
            return leaf
        merge = jax.jit(functools.partial(lora.merge, options), out_shardings=leaves[name].sharding)
        return merge(leaf, flat[f"{name}/a"], flat[f"{name}/b"])

    return merge_leaf
