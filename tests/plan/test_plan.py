"""Plans of a model of Llama-2-70B's width and two layers, compiled by the real TPU compiler."""

import json

import pytest

from lemur_jax.common.config import default_config
from lemur_jax.common.errors import UserError
from lemur_jax.models.presets import preset
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
    made = plan(options, topology, hlo_path=str(tmp_path / "step.hlo"))
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
    made = plan(options, "v5e-1")  # 2.2 billion parameters with AdamW take 25 GiB
    assert not made.fits
    assert made.step_seconds is None
    assert made.hbm_bytes_per_chip > 20 * GIB
    assert "DOES NOT FIT" in report(made)


def test_the_mesh_must_cover_the_slice():
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    options = config()
    options.mesh.fsdp = 3
    with pytest.raises(UserError, match="does not multiply to the 16 devices"):
        plan(options, "v5e-16")


def test_reading_the_compilers_refusal():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (53.65G) exceeds available HBM (30.75G). HLO module: jit_f."
    )
    refused = compiling.out_of_memory(message, 1.0)
    assert not refused.fits
    assert refused.peak_bytes == pytest.approx(53.65 * GIB, abs=1)
