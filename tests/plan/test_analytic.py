"""Lower bounds from shapes: by hand, and against what the compiler keeps."""

import pytest
from jax.sharding import AbstractMesh

from lemur_jax.config import RunConfig, replace
from lemur_jax.models.presets import preset
from lemur_jax.models.remat import POLICIES
from lemur_jax.parallel.mesh import AXES
from lemur_jax.plan import analytic, search, topologies
from lemur_jax.plan.plan import plan


def seven_billion(positions=4096, **changes):
    """Llama-2-7B with rows of `positions` tokens; the argument `train__steps` sets config.train.steps."""
    options = {"data.sequence_length": positions, "train.batch_rows": 32, "init.checkpoint": "base"}
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    return replace(RunConfig(model=preset("llama2_7b", max_position_embeddings=positions)), options)


def bound_of(slice_, *positions, **changes):
    return analytic.lower_bound(seven_billion(*positions, **changes), topologies.find_slice(slice_))


def buffers_of(bound):
    return {what.partition(",")[0]: size for size, what in bound.buffers}


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "share"), [*((policy, 0.0) for policy in POLICIES), ("mlp", 0.5)])
def test_no_policy_keeps_less_than_its_bound(tpu_compiler, narrow, policy, share):
    """The arrays that the compiled loop over the layers carries, of two layers on a v4-16."""
    options = {"compute.remat": policy, "compute.gate_share": share}
    config, mesh = narrow(options), AbstractMesh((1, 8, 1, 1, 1), AXES)
    assert config.data.sequence_length == 512
    bound = (
        sum(size for _, size in analytic.stored_bytes(config.model, config.compute, 512, mesh, "keep")) * 512
    )
    kept = plan(config, "v4-16").hbm["activations"]
    assert 0.7 * kept <= bound <= 1.01 * kept  # both 0 where all goes to the host


def test_the_bound_of_keeping_everything_is_the_largest():
    size = {policy: bound_of("v5p-32", compute__remat=policy).bytes for policy in POLICIES}
    assert size["full"] < size["attention"] < size["mlp"] < size["dots"] <= size["mlp_all"] < size["none"]
    assert max(size, key=size.get) == "none"


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bounds_by_hand(dtype, size):
    """Sums of gradients and moments are float32, whatever the parameters are."""
    options = {"train__batch_rows": 64, "train__microbatches": 2, "compute__remat": "attention"}
    bound = bound_of("v5e-16", compute__param_dtype=dtype, **options)
    buffers, wide = buffers_of(bound), 6_738_415_616 * 4 / 16
    assert buffers["parameters"] == pytest.approx(wide * size / 4, rel=1e-3)
    assert buffers["gradients"] == pytest.approx(wide, rel=1e-3)
    assert buffers["optimizer state"] == pytest.approx(2 * wide, rel=1e-3)
    rows = 64 / 2 / 16
    assert buffers["activations kept: attention_out"] == rows * 4096 * 4096 * 2 * 32
    assert buffers["activations kept: layer_in"] == rows * 4096 * 4096 * 2 * 32
    # 6 FLOPs a parameter and token, 2 more for the layers that are computed again, at 197 TFLOP/s.
    tokens = 64 * 4096
    assert bound.compute > 6 * 6.6e9 * tokens / (16 * 197e12)
    assert bound.compute < 8.5 * 6.74e9 * tokens / (16 * 197e12) * 1.2
    # Products in 8 bits take half the time.
    narrow = bound_of("v5e-16", compute__product_dtype="int8", **options)
    assert narrow.compute == pytest.approx(bound.compute / 2)


def test_gradients_are_reduced_once_at_least():
    """Weights of layers are gathered twice a microbatch, embedding and head once; a gradient moves as much once."""
    total, ends = 6_738_415_616, 2 * 32_000 * 4096

    def network(**changes):
        return bound_of("v5e-16", **changes).network

    once = network(train__microbatches=1)
    gathers = 2 - ends / total
    assert once == pytest.approx((gathers + 1) * total * 2 * 15 / 16 / (2 * 45e9), rel=1e-3)
    assert network(train__microbatches=2) / once == pytest.approx((2 * gathers + 1) / (gathers + 1))
    # With an adapter weights have no gradient; in 8 bits half as much travels.
    assert network(adapter__rank=8) / once == pytest.approx(gathers / (gathers + 1))
    narrow = network(adapter__rank=8, adapter__base_dtype="int8")
    assert narrow / once == pytest.approx(gathers / 2 / (gathers + 1))
    assert network(compute__product_dtype="int8") / once == pytest.approx((gathers / 2 + 1) / (gathers + 1))
    # Over 2 x 8: seven eighths of the weights move over fsdp, and an eighth of the gradients twice half of its size.
    parts = network(mesh__data=2, mesh__fsdp=8) / once
    assert parts == pytest.approx(((gathers + 1) * 7 / 8 + 2 * 1 / 8 * 1 / 2) / ((gathers + 1) * 15 / 16))


def test_positions_traded_for_heads_cost_time():
    config = seven_billion(16_384, train__batch_rows=16, mesh__fsdp=1, mesh__sequence=16)
    # Query, key, value and output: 15 of 16 parts of 4 x 4096 numbers a position go to others, in 32 layers, both ways.
    moved = 2 * 32 * 16_384 * 4 * 4096 * 2 * 15 / 16
    bound = analytic.lower_bound(config, topologies.find_slice("v5e-16"))
    assert bound.network == pytest.approx(moved / (2 * 45e9), rel=0.01)
    assert bound.exchange == pytest.approx(moved / 45e9, rel=0.01)
    waiting = bound.network + bound.exchange
    assert bound.likely_seconds == pytest.approx(bound.compute + bound.memory + waiting)
    # 8 key heads are repeated for 16 devices: 32 + 16 heads in place of 64.
    config = replace(config, {"model.num_key_value_heads": 8})
    fewer = analytic.lower_bound(config, topologies.find_slice("v5e-16"))
    assert fewer.exchange == pytest.approx(bound.exchange * 48 / 64)
    config = replace(config, {"model.num_attention_heads": 20, "model.num_key_value_heads": 20})
    result = search.SearchResult()
    kept = search.all_layouts(config, topologies.find_slice("v5e-16"), result)
    assert all(each.changes["mesh.sequence"] < 8 for each in kept)
    assert result.pruned["the model, the batch or the config does not allow it"]


def test_what_layers_keep_is_cut_over_tensor():
    """A row lies on 4 chips instead of one, so each has four times the tokens and a fourth of every array."""
    cut, uncut = (bound_of("v5e-4", compute__remat="mlp_all", mesh__tensor=tensor) for tensor in (4, 1))
    by_name, whole = buffers_of(cut), buffers_of(uncut)
    kept = [name for name in whole if name.startswith("activations kept")]
    assert len(kept) == 7
    assert all(by_name[name] == whole[name] for name in kept)
    # Four sums a layer, each scattered and gathered: three fourths of 4096 numbers a token.
    assert cut.exchange == pytest.approx(4 * 2 * 32 * (32 * 4096) * 4096 * 2 * 3 / 4 / 45e9)


def test_host_memory_costs_time():
    bound = bound_of("v5e-16", compute__remat="offload_full", train__batch_rows=16)
    assert bound.host == pytest.approx(2 * 4096 * 4096 * 2 * 32 / 12e9)  # there and back
    assert not any("activations" in what for _, what in bound.buffers)
