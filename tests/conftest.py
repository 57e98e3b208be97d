"""All tests run on the CPU with eight virtual devices, and never reach for the network."""

import logging
import os
import pathlib
import tempfile

import pytest

from lemur_jax.cluster import hosts

# Fixtures that several packages' tests share: tokenizers, stores of made-up documents, small configs, runs, gs://.
pytest_plugins = [
    *("tests.helpers.documents", "tests.helpers.chat_models", "tests.helpers.runs"),
    "tests.helpers.object_store",
]

# Compilation takes most of the time of the tests. Without optimization the tests of the train step take a quarter of
# the CPU time. `XLA_FLAGS= bash launch/test.sh` compiles as users do.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
# All processes of a test run, also those that tests start, share one compilation cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="lemur-compiled-")  # removed when the first process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
hosts.choose_platform(virtual_devices=8)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("lemur_jax").setLevel(logging.INFO)  # pytest's `caplog` sees what a user sees

# Modules whose tests start processes or compile for seconds: `bash launch/test.sh --quick` leaves them out.
PROCESS_MODULES = {
    "checkpoint/test_damage",
    "checkpoint/test_listing",
    "checkpoint/test_manager",
    "checkpoint/test_policies",
    "cluster/test_hosts",
    "convert/test_families",
    "convert/test_import_hf",
    "convert/test_memory",
    "convert/test_vocabulary",
    "evals/test_code",
    "evals/test_harness",
    "evals/test_paper",
    "faults/test_drill",
    "hosts/test_checkpoints",
    "hosts/test_two_hosts",
    "infer/test_engine",
    "infer/test_generate",
    "infer/test_quantize",
    "infer/test_serve",
    "infer/test_smoke",
    "infer/test_verbs",
    "models/test_attention",
    "models/test_decoder",
    "models/test_experts",
    "plan/test_generate",
    "plan/test_plan",
    "plan/test_search",
    "prepare/test_beam",
    "prepare/test_prepare_files",
    "prepare/test_readers",
    "report/test_samples",
    "rl/test_rl",
    "sweep/test_sweep",
    "telemetry/test_profiler",
    "test_benchmarks",
    "test_cli",
    "test_docs_data",
    "test_docs_tune",
    "test_layers",
    "test_quickstart_tasks",
    "test_recipe",
    "test_recipe_data",
    "text/test_real_tokenizers",
    "text/test_tokenizer_parity",
    "train/test_adapters",
    "train/test_checkpointing",
    "train/test_losses",
    "train/test_objectives",
    "train/test_optimizer",
    "train/test_preferences",
    "train/test_resume",
    "train/test_spikes",
    "train/test_step",
    "train/test_workdir",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests of these modules `process`."""
    root = pathlib.Path(__file__).parent
    renamed = [module for module in PROCESS_MODULES if not (root / f"{module}.py").exists()]
    assert not renamed, f"PROCESS_MODULES of tests/conftest.py names modules that are not there: {renamed}"
    for item in items:
        if item.path.relative_to(root).with_suffix("").as_posix() in PROCESS_MODULES:
            item.add_marker("process")
