"""All tests run on the CPU with eight virtual devices, and never reach for the network."""

import logging
import os
import pathlib

import pytest

from lemur_jax.agents.scratch import make_directory
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
    # Removed when the first process ends, or with the next one where it is killed.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(make_directory("compiled-"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
hosts.choose_platform(virtual_devices=8)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("lemur_jax").setLevel(logging.INFO)  # pytest's `caplog` sees what a user sees

# Modules whose tests start processes or compile for seconds: `bash launch/test.sh --quick` leaves them out.
PROCESS_MODULES = {
    "checkpoint": "damage listing manager policies",
    "cluster": "hosts",
    "convert": "families import_hf memory vocabulary",
    "evals": "code harness paper",
    "faults": "drill",
    "hosts": "checkpoints two_hosts",
    "infer": "engine generate quantize serve smoke verbs",
    "models": "attention decoder experts splash",
    "plan": "generate plan search",
    "prepare": "beam prepare_files readers",
    "report": "samples",
    "rl": "rl",
    "sweep": "sweep",
    "telemetry": "profiler",
    "": "benchmarks cli docs_data docs_tune layers quickstart_tasks recipe recipe_data",
    "text": "real_tokenizers tokenizer_parity",
    "train": "adapters checkpointing doctor losses objectives optimizer preferences resume spikes step workdir",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests of these modules `process`, and puts them first: long files at the end leave a worker idle."""
    root = pathlib.Path(__file__).parent
    modules = {
        root / where / f"test_{name}.py" for where, names in PROCESS_MODULES.items() for name in names.split()
    }
    renamed = [module for module in modules if not module.exists()]
    assert not renamed, f"PROCESS_MODULES of tests/conftest.py names modules that are not there: {renamed}"
    for item in items:
        if item.path in modules:
            item.add_marker("process")
    items.sort(key=lambda item: item.path not in modules)
