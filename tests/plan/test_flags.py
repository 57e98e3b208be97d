"""The compiler takes its options on every generation, and knows nothing of them elsewhere."""

import jax
import jax.numpy as jnp
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.parallel.compiler_flags import check_product_dtype, compiler_options, exchanges_gradients
from lemur_jax.plan import topologies


@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_the_compiler_accepts_them(tpu_compiler, name):
    device = topologies.described_devices(topologies.find_slice(name))[0]
    options = compiler_options(device.device_kind)
    assert options
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    jax.jit(jnp.dot, compiler_options=options).lower(x, x).compile()


def test_by_device_kind():
    assert compiler_options("cpu") == {}
    assert compiler_options("NVIDIA H100 80GB HBM3") == {}
    assert compiler_options("TPU v5 lite") != compiler_options("TPU v5")
    assert exchanges_gradients("TPU v4")
    assert not exchanges_gradients("TPU v5 lite")  # "Async all-to-all not supported on limited ICI"
    assert not exchanges_gradients("cpu")
    assert not exchanges_gradients("TPU v4", ("xla_tpu_enable_async_all_to_all=false",))
    assert exchanges_gradients("TPU v4", ("xla_tpu_enable_async_all_gather=false",))
    for kind in ("TPU v5", "TPU v6 lite"):  # SparseCores sum them
        assert not exchanges_gradients(kind)
    assert exchanges_gradients("TPU v6 lite", ("xla_tpu_enable_async_all_to_all=true",))


@pytest.mark.parametrize(
    ("name", "kind", "frozen", "says"),
    [
        ("int8", "TPU v4", False, "no faster than bfloat16 on TPU v4"),
        ("float8", "TPU v5", False, "only on TPU7x"),
        ("int8", "cpu", True, "with config.adapter.rank"),
    ],
)
def test_narrow_products_that_gain_nothing_are_refused(name, kind, frozen, says):
    with pytest.raises(UserError, match=says):
        check_product_dtype(name, kind, frozen)
    check_product_dtype("int8", "TPU v5 lite")
    check_product_dtype("float8", "TPU7x")
    check_product_dtype("float8", "cpu")


def test_more_options_of_the_config():
    more = ("xla_tpu_scheduler_percent_shared_memory_limit=110", "xla_enable_async_all_gather=false")
    options = compiler_options("TPU v4", more)
    assert options["xla_tpu_scheduler_percent_shared_memory_limit"] == 110
    assert options["xla_enable_async_all_gather"] is False  # the config wins
    assert set(compiler_options("TPU v4")) < set(options)
    assert compiler_options("cpu", more) == {}
    for wrong in ("--xla_enable_async_all_gather=true", "xla_enable_async_all_gather"):
        with pytest.raises(UserError, match="write xla_name=value"):
            compiler_options("cpu", (wrong,))
