"""Plans of small models, compiled by the real TPU compiler."""

import json
import logging
import re

import pytest
from jax.sharding import AbstractMesh

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig, replace
from lemur_jax.models.decoder import num_params, param_sizes
from lemur_jax.models.presets import preset
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.plan import analytic, cost, hlo, topologies
from lemur_jax.plan.candidates import OPTIONS
from lemur_jax.plan.compile import Compiled, device_bytes
from lemur_jax.plan.plan import (
    GIB,
    check_host_transfers,
    format_plan,
    forward_loops,
    kept_activations,
    plan,
    program_plan,
)
from lemur_jax.train.step import build


def matrices(model):
    """Parameters of attention and mlp."""
    return sum(size for path, size in param_sizes(model).items() if re.search("/(attention|mlp)/", path))


def test_an_update_on_v4(narrow_plan):
    options, made, text = narrow_plan
    model = options.model
    assert made.fits
    assert made.chips == 8
    assert made.mesh == {"data": 1, "fsdp": 8, "expert": 1, "sequence": 1, "tensor": 1}
    assert made.hbm_limit_bytes_per_chip == int(30.75 * GIB)
    weights = num_params(model)
    # Norm scales are whole on every chip.
    assert made.hbm["parameters"] == pytest.approx(4 * weights / 8, rel=0.01)
    assert made.hbm["optimizer"] == pytest.approx(2 * made.hbm["parameters"], rel=0.01)
    # Input and attention output of each layer, bf16, one row per chip.
    kept = 1024 + model.num_attention_heads * 128
    assert made.hbm["activations"] == pytest.approx(2 * model.num_hidden_layers * 512 * kept, rel=0.05)
    assert sum(made.hbm.values()) == made.hbm_bytes_per_chip < made.hbm_limit_bytes_per_chip

    # Nothing may beat the analytic bounds or the peak.
    bound = analytic.lower_bound(options, topologies.find_slice("v4-16"))
    assert 0.1 * made.hbm_bytes_per_chip < bound.bytes < made.hbm_bytes_per_chip
    assert bound.seconds < made.step_seconds
    assert 0 < made.mfu < made.mfu_full_attention < 0.9
    assert made.step_seconds == pytest.approx(sum(made.parts.values()))
    assert made.tokens_per_second_per_chip == pytest.approx(8 * 512 / made.step_seconds / 8)
    assert made.days * 86_400 == pytest.approx(10 * made.step_seconds)
    assert made.parts["attention kernels"] > 0

    moved = {row["kind"]: row["bytes"] for row in made.collectives}
    # Weights of the layers are gathered twice in bf16, embedding and head once at least.
    ends = sum(size for path, size in param_sizes(model).items() if not path.startswith("layers/"))
    assert 2 * (2 * weights - ends) * 0.99 < moved["all-gather"] < 2 * 3 * weights
    # Gradients travel by all-to-alls in bf16.
    assert set(re.findall(r"= \(*(\w+)\[.* all-to-all(?:-start)?\(", text)) == {"bf16"}
    assert moved["all-to-all"] == pytest.approx(2 * matrices(model), rel=0.01)

    assert text.startswith("HloModule jit_update")
    assert made.tokens_per_step == 4096
    printed = format_plan(made)
    assert re.search(r"\nFITS: .*\nESTIMATED step of 4,096 tokens", printed, re.DOTALL)
    hours = float(re.search(r"(\S+) chip-hours", printed)[1])  # few, but not 0
    assert hours == pytest.approx(made.chip_hours, rel=0.05)
    # The compiler's cycles, recorded with this libtpu: what makes Llama's step slower is noticed.
    if made.versions["libtpu"] == "0.0.52":
        cycles = (made.parts["matmul"] + made.parts["other compute"]) * topologies.GENERATIONS["v4"].clock
        assert cycles == pytest.approx(1_387_678, rel=0.005)


def test_what_does_not_fit_names_the_way_out(
    tpu_compiler, write_config, tmp_path, capsys, monkeypatch, caplog
):
    """From the command line, with exit code 1 and lines of progress."""
    caplog.set_level(logging.INFO, "lemur_jax")
    monkeypatch.setattr("lemur_jax.plan.compile._PROGRESS", 0.01)
    config = write_config(
        tmp_path,
        "config = default_config(preset('llama2_70b', num_hidden_layers=2))",
        "config.data.sequence_length, config.train.batch_rows = 128, 1",
        "config.compute.attention = 'xla'",
    )
    # 2.2 billion parameters with AdamW take 25 GiB.
    verb = ["plan", "--config", config, "--topology", "v5e-1", "--json", str(tmp_path / "plan.json")]
    assert main(verb) == 1
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["fits"] is False
    assert made["step_seconds"] is None
    assert made["hbm_bytes_per_chip"] > 20 * GIB
    # Far above the limit the compiler names no buffer, the shapes do.
    size, what = made["largest_buffers"][0]
    assert size == made["hbm"]["optimizer"] == pytest.approx(2 * made["hbm"]["parameters"])
    assert what == "optimizer state"
    text = capsys.readouterr().out
    over = (made["hbm_bytes_per_chip"] - made["hbm_limit_bytes_per_chip"]) / GIB
    assert "DOES NOT FIT" in text
    assert f"{over:.2f} GiB too much" in text
    assert what in text
    assert text.splitlines()[-1] == "add --search to look for a layout that fits"
    lines = [record.getMessage() for record in caplog.records if record.name == "lemur_jax.plan.compile"]
    assert lines[0] == "compiling the update for v5e-1; large models take minutes"
    assert lines[1].startswith("still compiling the update for v5e-1, ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({OPTIONS: ("xla_no_such=true",)}, "^No such compile option: 'xla_no_such': correct config.comp"),
        ({OPTIONS: ("xla_tpu_scoped_vmem_limit_kib=much",)}, "^Failed to parse 'much' into flag .*: correct"),
        ({"mesh.fsdp": 3}, "does not multiply to the 8 devices"),
    ],
)
def test_wrong_options(tpu_compiler, narrow, changes, message):
    with pytest.raises(UserError, match=message):
        plan(narrow(changes), "v4-16")


def test_rows_and_updates_that_follow_from_the_stores_are_planned(
    write_config, tmp_path, monkeypatch, capsys
):
    """As `lemur train` works them out: 2 epochs of 40 rows of 4 documents, 12 documents an update."""
    counts = {"chat": {"packing": "fit", "documents": 160, "rows": 40, "tokens": 4000}}
    (tmp_path / "counts-128.json").write_text(json.dumps(counts))
    config = write_config(
        tmp_path,
        "config = default_config(preset('tiny'))",
        f"config.data.stores, config.data.sequence_length = {str(tmp_path)!r}, 128",
        "config.data.sources = {'chat': {'epochs': 2.0, 'packing': 'fit'}}",
        "config.train.batch_documents = 12",
    )

    def refuse(config, *_, **__):
        raise UserError(f"{config.train.batch_rows} rows, {config.train.steps} updates")

    monkeypatch.setattr("lemur_jax.plan.plan.plan", refuse)
    verb = ["plan", "--config", config, "--topology", "v5e-1"]
    # A plan needs no network.
    for more, planned in (
        ([], "3 rows, 27 updates"),
        (["--config.data.stores=gs://b/s"], "128 rows, 1000 updates"),
    ):
        assert main([*verb, *more]) == 2
        assert capsys.readouterr().err == f"lemur plan: {planned}\n"


@pytest.mark.slow
def test_gradients_travel_in_the_dtype_of_the_config(tpu_compiler, narrow, tmp_path):
    """As in `test_an_update_on_v4`, with 4 bytes for each weight of the layers."""
    options = narrow({"compute.reduce_dtype": "float32"})
    made = plan(options, "v4-16", hlo_path=str(tmp_path / "step.hlo"))
    sent = re.findall(r"= \(*(\w+)\[.* all-to-all(?:-start)?\(", (tmp_path / "step.hlo").read_text())
    assert set(sent) == {"f32"}
    moved = {row["kind"]: row["bytes"] for row in made.collectives}
    assert moved["all-to-all"] == pytest.approx(4 * matrices(options.model), rel=0.01)


@pytest.mark.slow
def test_an_option_chooses_all_reduces_of_gradients(tpu_compiler, narrow):
    made = plan(narrow({"compute.compiler_options": ("xla_tpu_enable_async_all_to_all=false",)}), "v4-16")
    assert not {row["kind"] for row in made.collectives} & {"all-to-all", "ragged-all-to-all"}


@pytest.mark.slow
def test_activations_are_cut_over_tensor_between_the_products(tpu_compiler, narrow):
    """On v4-8 as fsdp 1 x tensor 4: reduce-scatters and gathers of them, no all-reduce of their size."""
    options = narrow({"mesh.tensor": 4, "compute.remat": "full"}, num_key_value_heads=4)
    made = plan(options, "v4-8")
    stream = 8 * 512 * 1024 * 2
    layers = options.model.num_hidden_layers
    assert made.hbm["activations"] == pytest.approx(layers * stream / 4, rel=0.05)
    moved = {row["kind"]: row["bytes"] for row in made.collectives}
    # Out and down forward, and before them the gradients of both norms' results; recomputation needs out again.
    assert moved["reduce-scatter"] == pytest.approx(5 * layers * stream, rel=0.25)
    assert moved["all-reduce"] < stream


@pytest.mark.parametrize(("name", "share"), [("adafactor", 0.02), ("muon", 1.3)])
def test_states_of_other_optimizers_are_counted(tpu_compiler, narrow, name, share):
    """Against AdamW's two moments per parameter in `test_an_update_on_v4`."""
    options = narrow({"optimizer.name": name})
    mesh = make_mesh(options.mesh, topologies.described_devices(topologies.find_slice("v4-16")))
    state = build(options, mesh, num_sources=1).state
    assert 0.2 * share < device_bytes(state.optimizer) / device_bytes(state.params) < share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "length", "ways"),
    [("llama2_7b", "v5e-16", 32_768, 8), ("llama3.1_8b", "v5p-16", 131_072, 8)],
)
def test_two_layers_of_a_long_context(tpu_compiler, name, topology, length, ways):
    """Positions are cut over devices, exchanged for heads before the attention kernels and back after them."""
    model = preset(name, num_hidden_layers=2, max_position_embeddings=length, vocab_size=32_000)
    options = {
        "data.sequence_length": length,
        "mesh.sequence": ways,
        "compute.remat": "attention",
        "train.batch_rows": topologies.find_slice(topology, 1).chips // ways,
    }
    made = plan(replace(RunConfig(model=model), options), topology)
    assert made.fits
    assert made.mesh["sequence"] == ways
    # Input and attention output of each layer, bf16, of the positions of a chip.
    assert made.hbm["activations"] == pytest.approx(2 * 2 * 2 * length // ways * 4096, rel=0.1)
    # Forward and twice backward: queries, keys, values and outputs travel.
    assert {row["kind"]: row["count"] for row in made.collectives}["all-to-all"] >= 2 * 4 * 2


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_two_slices_exchange_gradients_alone(tpu_compiler, tmp_path, microbatches):
    """Once an update, however many microbatches it has."""
    model = preset("tiny", hidden_size=512, intermediate_size=1024)
    options = {"data.sequence_length": 128, "train.batch_rows": 8 * microbatches, "mesh.data": 2}
    options |= {"train.microbatches": microbatches}
    config = replace(RunConfig(model=model), options)
    made = plan(config, "v5e-4", slices=2, hlo_path=str(tmp_path / "step.hlo"))
    assert made.chips == 8
    module = hlo.parse((tmp_path / "step.hlo").read_text())
    instructions = [each for body in module.computations.values() for each in body.values()]
    for each in instructions:
        if each.opcode.removesuffix("-start") in hlo.COLLECTIVES:
            assert len(hlo.group(each.attributes, 8)) <= 4, each.name  # stays inside a slice
    sends = [each for each in instructions if each.opcode == "send"]
    assert sends
    assert {each.attribute("_xla_megascale_transfer_type") for each in sends} == {"ALL_REDUCE"}
    # Each device exchanges its quarter of the gradient in bfloat16, and little else: norms and scalars, padded.
    (row,) = [row for row in made.collectives if row["kind"] == "all-reduce, slices"]
    weights = num_params(model)
    assert 2 * weights / 4 * 0.98 < row["bytes"] < 2 * weights / 4 * 1.3
    # Two ways, half of it each, at 3.125 GB/s.
    assert row["seconds"] == pytest.approx(row["bytes"] / 3.125e9)


def test_all_bytes_are_those_of_a_chip(tpu_compiler):
    """Of tpu7x a chip is two devices."""
    compiled = Compiled(fits=True, seconds=1.0, peak_bytes=7, host_bytes=5)
    estimate = cost.Cost(seconds=1.0)
    estimate.traffic["all-gather"].bytes = 3
    made = program_plan(
        compiled, estimate, topologies.find_slice("tpu7x-8"), AbstractMesh((8,), ("fsdp",)), {"batch": 1}, 1
    )
    assert made.hbm == {"batch": 2, "temporaries": 12}
    assert (made.hbm_bytes_per_chip, made.host_bytes_per_chip) == (14, 10)
    assert made.collectives[0]["bytes"] == 6


@pytest.mark.parametrize("moved", [0, 100, 149])  # none; one direction; less than both of a peeled layer
def test_an_estimate_without_the_transfers_of_offloaded_arrays_is_refused(moved):
    estimate = cost.Cost()
    estimate.traffic[cost.HOST].bytes = moved
    compiled = Compiled(fits=True, seconds=1.0, hlo="HloModule", host_bytes=100)
    with pytest.raises(
        ValueError, match=f"keeps 100 bytes in host memory, but only {moved} bytes of transfers"
    ):
        check_host_transfers(compiled, estimate)
    estimate.traffic[cost.HOST].bytes = 150
    check_host_transfers(compiled, estimate)
    check_host_transfers(Compiled(fits=True, seconds=1.0), cost.Cost())


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4-16", "v5e-8", "v5p-16", "v6e-8", "tpu7x-8"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_update_that_offloads(tpu_compiler, narrow, topology, share):
    """Each layer's input goes to the host and comes back, on every generation; that of a peeled layer may go twice.

    Half the gate of width 2048 is as much again.
    """
    options = narrow({"compute.remat": "offload_full", "compute.gate_share": share})
    made = plan(options, topology)
    stored = options.model.num_hidden_layers * 512 * 1024 * 2 * 8 / topologies.find_slice(topology).chips
    stored *= 1 + 2 * share
    (row,) = [row for row in made.collectives if row["kind"] == cost.HOST]
    assert 1.99 * stored < row["bytes"] < 2.51 * stored


_LOOP = """%cond (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %stop = s32[] constant(STOP)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %stop), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  ROOT %t = (s32[]) tuple(%p)
}

ENTRY %main (q: f32[8]) -> f32[8] {
  %zero = s32[] constant(0)
  %init = (s32[]) tuple(%zero)
  %forward = (s32[], bf16[4,2,8]) while(%init), condition=%cond, body=%bodyNAME1
  ROOT %backward = (s32[], f32[4,9,9]) while(%init), condition=%cond, body=%bodyNAME2
}
"""


_NAMES = ("jit(update)/jvp()/while", "jit(update)/transpose(jvp())/while")


@pytest.mark.parametrize(
    ("trips", "names", "stacked"),
    [
        ("4", _NAMES, "4"),
        # A layer is peeled off: the loop may lose its name, and may carry all layers or those of its trips.
        ("3", _NAMES, "4"),
        ("3", _NAMES, "3"),
        ("3", ("", ""), "4"),
        ("3", ("", ""), "3"),
    ],
)
def test_what_the_loop_over_layers_keeps(trips, names, stacked):
    text = _LOOP.replace("STOP", trips).replace("bf16[4,", f"bf16[{stacked},")
    for place, name in zip(("NAME1", "NAME2"), names, strict=True):
        text = text.replace(place, f', metadata={{op_name="{name}"}}' if name else "")
    module = hlo.parse(text)
    assert [loop.name for loop, _ in forward_loops(module, 4)] == ["forward"]
    assert kept_activations(module, 4, {}) == 2 * int(stacked) * 2 * 8
