"""Plans of a model of Llama-2-70B's width and two layers, compiled by the real TPU compiler."""

import json
import re

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.config import default_config, from_config_dict, load
from lemur_jax.models.presets import preset
from lemur_jax.plan import analytic, hlo, topologies
from lemur_jax.plan import compile as compiling
from lemur_jax.plan.plan import GIB, plan, report
from lemur_jax.telemetry.flops import parameter_counts


def config(layers=2):
    options = default_config(preset("llama2_70b", num_hidden_layers=layers).to_dict())
    options.data.sequence_length = 1024
    options.train.batch_rows = 16
    options.train.steps = 10
    options.compute.loss_chunk = 0
    options.compute.remat = "attention"
    return options


@pytest.mark.parametrize(("topology", "chips", "limit"), [("v4-32", 16, 30.75), ("v5e-16", 16, 15.75)])
def test_two_layers_of_70b(topology, chips, limit, tmp_path):
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    options = config()
    made = plan(from_config_dict(options), topology, hlo_path=str(tmp_path / "step.hlo"))
    assert made.fits
    assert made.chips == chips
    assert made.mesh == {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 1}
    assert made.hbm_limit_bytes_per_chip == int(limit * GIB)
    weights = parameter_counts(preset("llama2_70b", num_hidden_layers=2)).total
    # Norm scales are whole on every chip.
    assert made.hbm["parameters"] == pytest.approx(4 * weights / chips, rel=1e-3)
    assert made.hbm["optimizer"] == pytest.approx(2 * made.hbm["parameters"], rel=1e-3)
    # Input and attention output of each layer, bf16, a row a chip.
    assert made.hbm["activations"] == pytest.approx(2 * 2 * 2 * 1024 * 8192, rel=0.05)
    assert sum(made.hbm.values()) == made.hbm_bytes_per_chip < made.hbm_limit_bytes_per_chip

    # Nor may anything beat the analytic bounds, which should not be far off either.
    bound = analytic.bound(options, topologies.find(topology))
    assert 0.3 * made.hbm_bytes_per_chip < bound.bytes < made.hbm_bytes_per_chip
    assert 0.3 * made.step_seconds < bound.seconds < made.step_seconds

    # No estimate may beat the peak: 3 passes over the matrices at 275 or 197 TFLOP/s.
    assert 0.1 < made.mfu < made.mfu_full_attention < 0.9
    assert made.step_seconds == pytest.approx(sum(made.parts.values()))
    assert made.tokens_per_second_per_chip == pytest.approx(16 * 1024 / made.step_seconds / chips)
    assert made.days * 86_400 == pytest.approx(10 * made.step_seconds)
    assert made.parts["attention kernels"] > 0
    moved = {row["kind"]: row["bytes"] for row in made.collectives}
    # Weights of two layers are gathered twice in bf16, embedding and head once or twice.
    assert 2 * 2 * weights * 0.85 < moved["all-gather"] < 2 * 3 * weights
    assert (tmp_path / "step.hlo").read_text().startswith("HloModule jit_update")
    written = json.loads(made.to_json())
    assert written["fits"] is True
    assert set(written) >= {
        "hbm_bytes_per_chip", "step_seconds", "tokens_per_step", "tokens_per_second_per_chip", "mfu",
        "mfu_full_attention",
    }  # fmt: skip
    text = report(made)
    assert "FITS" in text
    assert "ESTIMATED step of 16,384 tokens" in text


def test_what_does_not_fit_is_said():
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    options = config()
    options.compute.attention = "xla"
    options.data.sequence_length = 128
    options.train.batch_rows = 1
    made = plan(from_config_dict(options), "v5e-1")  # 2.2 billion parameters with AdamW take 25 GiB
    assert not made.fits
    assert made.step_seconds is None
    assert made.hbm_bytes_per_chip > 20 * GIB
    # Far above the limit the compiler names no buffer, the shapes do: two layers' gate, up or down in float32.
    size, what = made.largest_buffers[0]
    assert size == 2 * 8192 * 28_672 * 4
    assert "mlp" in what
    assert json.loads(made.to_json())["largest_buffers"][0] == [size, what]
    text = report(made)
    assert "DOES NOT FIT" in text
    assert f"{(made.hbm_bytes_per_chip - made.hbm_limit_bytes_per_chip) / GIB:.2f} GiB too much" in text
    assert what in text


@pytest.mark.parametrize(("dtype", "short", "moved"), [("", "bf16", 2), ("float32", "f32", 4)])
def test_gradients_travel_in_the_dtype_of_the_config(dtype, short, moved, tmp_path):
    """On v4 by all-to-alls; 2 or 4 bytes for each weight of the layer."""
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    options = default_config(preset("tiny", hidden_size=1024, intermediate_size=2048, head_dim=128).to_dict())
    options.data.sequence_length = 512
    options.train.batch_rows = 8
    options.compute.loss_chunk = 0
    options.compute.reduce_dtype = dtype
    made = plan(from_config_dict(options), "v4-16", hlo_path=str(tmp_path / "step.hlo"))
    text = (tmp_path / "step.hlo").read_text()
    sent = re.findall(r"= \(*(\w+)\[.* all-to-all(?:-start)?\(", text)
    assert set(sent) == {short}
    layers = parameter_counts(preset("tiny", hidden_size=1024, intermediate_size=2048, head_dim=128))
    weights = layers.attention + layers.mlp
    found = {row["kind"]: row["bytes"] for row in made.collectives}
    assert found["all-to-all"] == pytest.approx(moved * weights, rel=0.01)


def test_activations_are_cut_over_tensor_between_the_products(tmp_path):
    """On v4-8 as fsdp 1 x tensor 4: reduce-scatters and gathers of them, no all-reduce of their size."""
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    shape = preset("tiny", hidden_size=1024, intermediate_size=2048, head_dim=128, num_key_value_heads=4)
    options = default_config(shape.to_dict())
    options.data.sequence_length = 512
    options.train.batch_rows = 8
    options.mesh.tensor = 4
    options.compute.loss_chunk = 0
    options.compute.remat = "full"
    made = plan(from_config_dict(options), "v4-8")
    stream = 8 * 512 * 1024 * 2
    layers = shape.num_hidden_layers
    assert made.hbm["activations"] == pytest.approx(layers * stream / 4, rel=0.05)
    moved = {row["kind"]: row["bytes"] for row in made.collectives}
    # Out and down forward, and before them the gradients of both norms' results; recomputing asks for out again.
    assert moved["reduce-scatter"] == pytest.approx(5 * layers * stream, rel=0.25)
    assert moved["all-reduce"] < stream


@pytest.mark.parametrize(("name", "share"), [("adafactor", 0.01), ("muon", 1.3)])
def test_states_of_other_optimizers_are_counted(name, share):
    """Against AdamW's two moments a parameter in `test_two_layers_of_70b`."""
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    options = config()
    options.optimizer.name = name
    program = compiling.program(from_config_dict(options), topologies.find("v4-32", 1))
    state, params = (compiling.device_bytes(tree) for tree in (program.state.optimizer, program.state.params))
    assert 0.2 * share < state / params < share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "length", "ways"),
    [("llama2_7b", "v5e-16", 32_768, 8), ("llama3.1_8b", "v5p-16", 131_072, 8)],
)
def test_two_layers_of_a_long_context(name, topology, length, ways):
    """Positions are cut over devices, traded for heads before the attention kernels and back after them."""
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    options = default_config(
        preset(name, num_hidden_layers=2, max_position_embeddings=length, vocab_size=32_000).to_dict()
    )
    options.data.sequence_length = length
    options.mesh.sequence = ways
    options.compute.remat = "attention"
    options.train.batch_rows = topologies.find(topology, 1).chips // ways
    made = plan(from_config_dict(options), topology)
    assert made.fits
    assert made.mesh["sequence"] == ways
    # Input and attention output of each layer, bf16, of the positions that a chip has.
    assert made.hbm["activations"] == pytest.approx(2 * 2 * 2 * length // ways * 4096, rel=0.1)
    # Forward and twice backward: queries, keys, values and outputs travel.
    assert {row["kind"]: row["count"] for row in made.collectives}["all-to-all"] >= 2 * 4 * 2


@pytest.mark.slow
@pytest.mark.parametrize(("argument", "length", "rate"), [("", 32_768, 1200), (":128k", 131_072, 500)])
def test_long_rows_with_all_layers(argument, length, rate):
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    options = load(f"configs/long_context.py{argument}")
    assert options.model.num_hidden_layers == 32
    assert options.data.sequence_length == length
    made = plan(options, "v5e-256")
    assert made.fits
    assert made.tokens_per_step == 4_194_304
    assert made.tokens_per_second_per_chip > rate


def test_two_slices_exchange_gradients_alone(tmp_path):
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    model = preset("tiny", hidden_size=512, intermediate_size=1024)
    options = default_config(model.to_dict())
    options.data.sequence_length = 128
    options.train.batch_rows = 16
    options.mesh.data = 2
    made = plan(from_config_dict(options), "v5e-4", slices=2, hlo_path=str(tmp_path / "step.hlo"))
    assert made.chips == 8
    module = hlo.parse((tmp_path / "step.hlo").read_text())
    instructions = [each for body in module.computations.values() for each in body]
    for each in instructions:
        if each.opcode.removesuffix("-start") in hlo.COLLECTIVES:
            assert len(hlo.group(each.attributes, 8)) <= 4, each.name  # stays inside a slice
    sends = [each for each in instructions if each.opcode == "send"]
    assert sends
    assert {each.attribute("_xla_megascale_transfer_type") for each in sends} == {"ALL_REDUCE"}
    # Each device exchanges its quarter of the gradient in bfloat16, and little else: norms and scalars, padded.
    (row,) = [row for row in made.collectives if row["kind"] == "all-reduce, slices"]
    weights = parameter_counts(model).total
    assert 2 * weights / 4 * 0.98 < row["bytes"] < 2 * weights / 4 * 1.3
    # Two ways, half of it each, at 3.125 GB/s.
    assert row["seconds"] == pytest.approx(row["bytes"] / 3.125e9)


def test_the_mesh_must_cover_the_slice():
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    options = config()
    options.mesh.fsdp = 3
    with pytest.raises(UserError, match="does not multiply to the 16 devices"):
        plan(from_config_dict(options), "v5e-16")


def test_reading_the_compilers_refusal():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (53.65G) exceeds available HBM (30.75G). HLO module: jit_f."
    )
    refused = compiling.out_of_memory(message, 1.0)
    assert not refused.fits
    assert refused.peak_bytes == pytest.approx(53.65 * GIB, abs=1)
    assert refused.largest == ()


def test_what_a_kernel_lacks_of_vector_memory_is_no_hbm():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for %splash_mqa_dkv ="
        " custom-call(). Scoped allocation with size 18.62M and limit 16.00M exceeded scoped vmem limit by 2.62M."
    )
    assert compiling.out_of_memory(message, 1.0).peak_bytes == 0
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 18.62M of 16.00M vmem."
    assert compiling.out_of_memory(used, 1.0).peak_bytes == 0


def test_reading_the_report_of_a_near_miss():
    message = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.12G of 30.75G hbm.
Exceeded hbm capacity by 2.37G.

Total hbm usage >= 34.00G:
    reserved        900.00M

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(update)/while/body/dot_general" source_file="llama.py"
     Shape: bf16[80,2,4096,8192]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[80,32,8192]{2,1,0}
     Allocation type: HLO temp
"""
    refused = compiling.out_of_memory(message, 1.0)
    assert refused.peak_bytes == pytest.approx(33.12 * GIB, abs=1)
    assert refused.largest == (
        (4 * GIB, "bf16[80,2,4096,8192] jit(update)/while/body/dot_general"),
        (GIB // 2, "f32[80,32,8192]"),
    )
