"""A model to start from: one of our checkpoints, or a Hugging Face directory."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from lemur_jax.checkpoint.metadata import tokenizer_files
from lemur_jax.checkpoint.reading import read_metadata, restore_params
from lemur_jax.common.errors import UserError
from lemur_jax.common.hub import local_model
from lemur_jax.common.json_files import digest_of
from lemur_jax.convert.hf_config import read_config, read_json
from lemur_jax.convert.hf_weights import holds_weights, open_checked, open_weights
from lemur_jax.convert.import_hf import digest_of_rows, hf_tokenizer_files, load_hf_params
from lemur_jax.convert.peft import adapter_of, merge_into
from lemur_jax.convert.vocabulary import NO_CHANGE
from lemur_jax.models.config import AdapterConfig, DecoderConfig
from lemur_jax.models.decoder import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model whose weights are not read yet."""

    model: DecoderConfig
    tokenizer_files: Mapping[str, bytes]  # content by name; empty without a tokenizer
    # Abstract tree with shardings -> parameters of its dtypes; UserError if they are damaged or not finite.
    # A second argument is applied to each leaf as soon as it is read: (path, leaf) -> leaf.
    restore: Callable[..., Params]
    # Of all weights; of a Hugging Face model, of one row of each matrix but those of experts.
    digest: Callable[[], str]
    run_config: dict[str, Any] | None = None  # of the run that made it, as JSON
    step: int | None = None  # of a checkpoint


def open_source(path: epath.PathLike, step: int | None = None) -> ModelSource:
    """Opens a checkpoint directory, a workdir (None: its newest step) or a Hugging Face model: local, gs://, ORG/NAME.

    Raises UserError: there is no model or two, a Hugging Face directory is damaged, or `step` is given with one.
    """
    path = local_model(path)
    directory = epath.Path(path)
    weights, checkpoints = holds_weights(path), (directory / "checkpoints").exists()
    if weights and checkpoints:
        raise UserError(
            f"{path} holds Hugging Face weights and checkpoints: name {path}/checkpoints, or move one away"
        )
    if weights:
        return _open_hugging_face(path, step)
    config = directory / "config.json"
    if not checkpoints and config.exists() and "model_type" in read_json(config):  # a run's config has none
        open_weights(path)  # its error names what is missing
    metadata = read_metadata(path, step)
    leaves, adapter = metadata["leaves"]["params"], adapter_of(metadata)
    return ModelSource(
        model=DecoderConfig.from_dict(metadata["model"]),
        tokenizer_files=tokenizer_files(metadata),
        restore=_open_adapter(path, metadata, adapter)
        if adapter
        else lambda abstract, each=_as_it_is: restore_params(path, abstract, metadata["step"], each),
        digest=lambda: digest_of({name: leaf.digest for name, leaf in leaves.items()}),
        run_config=metadata.get("config"),
        step=metadata["step"],
    )


def open_again(path: epath.PathLike, origin: Mapping[str, Any]) -> tuple[ModelSource, dict[str, Any]]:
    """`open_source` of what a run has read before, and its origin, {"step", "digest"}; empty: the newest step.

    Raises UserError: its weights are others than those of `origin`.
    """
    source = open_source(path, origin.get("step"))
    found = {"step": source.step, "digest": source.digest()}
    if origin and origin["digest"] != found["digest"]:
        raise UserError(
            f"{path} was made again since this run began: its weights are others; put back what was there"
            " (ORG/NAME@REVISION names it on the hub), or start in a new --workdir"
        )
    return source, found


def _as_it_is(name: str, leaf: Any) -> Any:
    return leaf


def _open_adapter(
    path: epath.PathLike, metadata: Mapping[str, Any], adapter: AdapterConfig
) -> Callable[..., Params]:
    """`restore` of an adapter's base, with the adapter merged where it is read."""
    base_path = metadata["config"]["init"]["checkpoint"]
    try:
        base, _ = open_again(base_path, metadata.get("origins", {}).get("init.checkpoint", {}))
    except UserError as error:
        raise UserError(f"{path} is an adapter of {base_path}, which cannot be read: {error}") from error

    def restore(abstract: Params, each: Callable[[str, Any], Any] = _as_it_is) -> Params:
        merged = merge_into(path, metadata, adapter, abstract)
        return base.restore(abstract, lambda name, leaf: each(name, merged(name, leaf)))

    return restore


def _open_hugging_face(path: epath.PathLike, step: int | None) -> ModelSource:
    if step is not None:
        raise UserError(f"{path} is a Hugging Face directory, which has no step {step}: leave --step out")

    def restore(abstract: Params, each: Callable[[str, Any], Any] = _as_it_is) -> Params:
        (dtype,) = {leaf.dtype for leaf in jax.tree.leaves(abstract)}
        shardings: Any = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return load_hf_params(path, shardings, dtype.name, each)[1]

    model, files = NO_CHANGE.apply(read_config(path), hf_tokenizer_files(path), path)
    tensors = open_checked(model, path)
    return ModelSource(
        model=model, tokenizer_files=files, restore=restore, digest=lambda: digest_of_rows(tensors)
    )
