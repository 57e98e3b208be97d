"""All tests run on the CPU with eight virtual devices, and never reach for the network."""

import logging
import os

from lemur_jax.cluster import hosts

# Fixtures that several packages' tests share: tokenizers, stores of made-up documents, small configs, runs, gs://.
pytest_plugins = [
    *("tests.helpers.documents", "tests.helpers.chat_models", "tests.helpers.runs"),
    "tests.helpers.object_store",
]

hosts.choose_platform(virtual_devices=8)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing outlives a run of the tests
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("lemur_jax").setLevel(logging.INFO)  # pytest's `caplog` sees what a user sees
