"""All tests run on the CPU with eight virtual devices, and never reach for the network."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices on two busy cores can keep each other waiting longer than XLA's 40 s, after which it aborts.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600 "
    + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
