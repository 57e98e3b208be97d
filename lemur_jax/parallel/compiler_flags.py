"""XLA:TPU options of the train step, by TPU generation; `lemur plan` and `lemur train` pass the same.

They affect only speed and memory. Each was kept because it improved the estimate; a generation lacks those that its
compiler warns about.
"""

import importlib.util
from collections.abc import Sequence

from lemur_jax.common.errors import UserError

Options = dict[str, bool | int | str]

# Weights are gathered while the layer before them computes. The default on v5e, off elsewhere.
_ASYNC_GATHERS: Options = {"xla_enable_async_all_gather": True}
# Gather fully sharded weights whole: loops of small matmuls and permutes are 1.7 x slower on a v4-32.
_WHOLE_GATHERS: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}

# parallel/projection.py reduces gradients by all-to-alls that overlap with computation. v5e has none.
_ASYNC_EXCHANGES = {"xla_tpu_enable_async_all_to_all": True}
# SparseCores gather weights and sum gradients beside the computation, as Google's recipes set it for some models; the
# gathers of v5p and v6e are synchronous otherwise. On two rings of 16 chips an all-to-all takes twice the time of an
# all-reduce. Llama-2-70B on v6e-256: 9.89 s with all-to-alls, 8.49 with sums, 7.72 with gathers too.
_SPARSECORES: Options = {
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_all_reduce_offload_tracing": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_all_gather_offload_tracing": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
}
# On tpu7x, as values of `config.compute.compiler_options`: gradients are summed by SparseCores there too.
SPARSECORE_SUMS = (
    "xla_tpu_enable_async_all_to_all=false",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "xla_tpu_enable_all_reduce_offload_tracing=true",
    "xla_tpu_use_tc_device_shape_on_sc=true",
)
# v5e can continue started reductions inside the products that follow.
_ASYNC_REDUCTIONS: Options = {
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
}
# Arrays in host memory are fetched inside the layer that needs them, early enough to overlap with its computation; by
# default the layer before fetches them at its end, and waits.
_LATE_FETCHES: Options = {"xla_tpu_pipeline_memory_host_transfers": False}

# By prefix of `jax.Device.device_kind`; the longest that matches counts.
OPTIONS: dict[str, Options] = {
    "TPU v4": {**_ASYNC_GATHERS, **_WHOLE_GATHERS, **_ASYNC_EXCHANGES, **_LATE_FETCHES},
    "TPU v5 lite": {**_WHOLE_GATHERS, **_ASYNC_REDUCTIONS},
    "TPU v5": {
        **_ASYNC_GATHERS,
        **_WHOLE_GATHERS,
        **_SPARSECORES,
        "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    },
    "TPU v6 lite": {
        **_ASYNC_GATHERS,
        **_WHOLE_GATHERS,
        **_SPARSECORES,
        "xla_tpu_scoped_vmem_limit_kib": 98_304,
    },
    "TPU7x": {**_WHOLE_GATHERS, **_ASYNC_EXCHANGES},
}


# TPUs whose matrix units multiply these dtypes at twice the speed of bfloat16.
_FAST_PRODUCTS = {"int8": ("TPU v5", "TPU v6 lite"), "float8": ("TPU7x",), "float8_per_tensor": ("TPU7x",)}


def check_product_dtype(name: str, device_kind: str, frozen: bool = False) -> None:
    """Refuses a `config.compute.product_dtype` that changes nothing, or does not make a TPU faster.

    Args:
      name: a name in `parallel.projection.ROUNDINGS`, or "".
      device_kind: `jax.Device.device_kind`; other devices may simulate all.
      frozen: whether the weights have no gradient.

    Raises:
      UserError: with what to do.
    """
    if name and frozen:
        raise UserError(
            "config.compute.product_dtype is for weights that are trained: leave it empty with config.adapter.rank"
        )
    if name and device_kind.startswith("TPU") and not device_kind.startswith(_FAST_PRODUCTS[name]):
        raise UserError(
            f"config.compute.product_dtype {name} is no faster than bfloat16 on {device_kind}, only on"
            f" {' and '.join(_FAST_PRODUCTS[name])}: leave it empty"
        )
    if name and importlib.util.find_spec("qwix") is None:
        raise UserError("config.compute.product_dtype needs qwix: pip install 'lemur_jax[int8]'")


def compiler_options(device_kind: str, more: Sequence[str] = ()) -> Options:
    """Options for `jax.jit(compiler_options=...)`; none off TPU.

    Args:
      device_kind: `jax.Device.device_kind`, e.g. "TPU v4".
      more: `config.compute.compiler_options`, "name=value" each; they win over the table's.

    Raises:
      UserError: one of `more` has another form.
    """
    overrides = dict(_read(text) for text in more)
    prefixes = [prefix for prefix in OPTIONS if device_kind.startswith(prefix)]
    return {**OPTIONS[max(prefixes, key=len)], **overrides} if prefixes else {}


def _read(text: str) -> tuple[str, bool | int | str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("xla_"):
        raise UserError(
            f"cannot read {text!r} in config.compute.compiler_options: write xla_name=value, without dashes"
        )
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.lstrip("-").isdigit() else value


def exchanges_gradients(device_kind: str, more: Sequence[str] = ()) -> bool:
    """Whether weight gradients are reduced by all-to-alls: where those run beside the computation.

    `more` is as for `compiler_options`: "xla_tpu_enable_async_all_to_all=false" chooses all-reduces, and "=true"
    all-to-alls.
    """
    return bool(compiler_options(device_kind, more).get("xla_tpu_enable_async_all_to_all"))
