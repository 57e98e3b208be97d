"""One compiled plan that several tests read."""

import os

import pytest

from lemur_jax.config import RunConfig, replace
from lemur_jax.models.presets import preset
from lemur_jax.plan.plan import plan


@pytest.fixture(scope="session")
def tpu_compiler():
    """Skips a test where the TPU compiler is not installed."""
    pytest.importorskip("libtpu", reason="the TPU compiler is missing: python -m pip install libtpu")


@pytest.fixture(scope="session")
def narrow():
    """`narrow(changes, **model)`: a config of two layers of width 1024 with heads of 128, for the attention kernels."""

    def make(changes=None, **model):
        shape = dict(hidden_size=1024, intermediate_size=2048, head_dim=128) | model
        options = {
            "data.sequence_length": 512,
            "train.batch_rows": 8,
            "train.steps": 10,
            "compute.loss_chunk": 0,
            "compute.remat": "attention",
        }
        return replace(RunConfig(model=preset("tiny", **shape)), options | (changes or {}))

    return make


@pytest.fixture(scope="session")
def write_config():
    """`write_config(directory, *lines)`: a config file with these lines; returns its path."""
    imports = "from lemur_jax.config import default_config\nfrom lemur_jax.models.presets import preset\n"

    def write(directory, *lines):
        path = directory / "config.py"
        path.write_text("\n    ".join([f"{imports}def get_config(arg=''):", *lines, "return config"]))
        return str(path)

    return write


@pytest.fixture(scope="session")
def narrow_plan(tpu_compiler, narrow, tmp_path_factory):
    """(config, plan, HLO text) of its update on a v4-16."""
    path = tmp_path_factory.mktemp("plan") / "step.hlo"
    options = narrow()
    return options, plan(options, "v4-16", hlo_path=str(path)), path.read_text()


@pytest.fixture(autouse=True, scope="session")  # before other fixtures of the session
def no_flags_that_libtpu_does_not_know():
    """libtpu aborts the process at a flag that only the CPU's compiler knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", ""))
        yield
