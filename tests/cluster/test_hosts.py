"""The platform and XLA's flags, chosen from the environment before JAX starts."""

import os
import subprocess
import sys

import pytest

from lemur_jax.cluster import hosts
from lemur_jax.cluster.exit import TRY_AGAIN
from lemur_jax.common.errors import UserError
from tests.helpers.hosts import free_port


@pytest.fixture
def chosen(monkeypatch):
    """XLA's flags as a dict after `choose_platform(devices)` in an environment that has `variables` alone."""

    def choose(devices=0, **variables):
        for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
            monkeypatch.setenv(name, "")  # so that monkeypatch puts it back, whatever is written meanwhile
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        hosts.choose_platform(devices)
        return dict(flag.partition("=")[::2] for flag in os.environ.get("XLA_FLAGS", "").split())

    return choose


def test_virtual_devices_are_cpu_devices_and_other_flags_of_the_user_stay(chosen):
    mine = "--xla_dump_hlo_as_text --xla_cpu_collective_call_terminate_timeout_seconds=7"
    count = "--xla_force_host_platform_device_count"
    flags = chosen(4, JAX_PLATFORMS="tpu", XLA_FLAGS=f"{mine} {count}=2")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert flags[count] == "4"
    assert flags["--xla_dump_hlo_as_text"] == ""
    assert flags["--xla_cpu_collective_call_terminate_timeout_seconds"] == "7"
    # Collectives follow one another on the CPU.
    assert flags["--xla_cpu_enable_concurrency_optimized_scheduler"] == "false"


def test_fewer_virtual_devices_than_none_are_refused(chosen):
    with pytest.raises(UserError, match=r"--virtual-devices is -3"):
        chosen(-3)
    assert "XLA_FLAGS" not in os.environ


def test_flags_of_another_platform_are_left_alone(chosen):
    assert chosen(JAX_PLATFORMS="tpu", XLA_FLAGS="--xla_dump_to=here") == {"--xla_dump_to": "here"}


STEPS = """
import os
from lemur_jax.cluster import hosts
hosts.choose_platform(virtual_devices=8)
import jax
from tests.helpers.tiny import rows
from tests.helpers.tiny import first_state, placed, program_on
program = program_on((2, 2, 1, 2))
state, batch = first_state(program), placed(rows(), program)
for _ in range(300):
    state, metrics = program.step(state, batch)
    metrics["loss"].block_until_ready()
"""


@pytest.mark.slow
def test_many_steps_over_eight_devices_on_busy_cores():
    """Three processes at once: with XLA's own schedule each of three came to a standstill within a minute."""
    variables = dict(os.environ, XLA_FLAGS="--xla_cpu_collective_call_terminate_timeout_seconds=60")
    runs = [subprocess.Popen([sys.executable, "-c", STEPS], env=variables) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]


KEEP = """
import jax, jax.monitoring, jax.numpy as jnp
from lemur_jax.cluster import hosts
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
hosts.keep_programs()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64)))
print(sum(name.endswith("compilation_cache/cache_hits") for name in found))
"""


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    def hits(**variables):
        environment = {
            **os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **variables,
        }  # fmt: skip
        if "JAX_COMPILATION_CACHE_DIR" not in variables:
            del environment["JAX_COMPILATION_CACHE_DIR"]  # conftest's
        done = subprocess.run([sys.executable, "-c", KEEP], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    kept = tmp_path / "cache" / "lemur_jax" / "programs"
    assert hits(JAX_ENABLE_COMPILATION_CACHE="false") == 0
    assert not kept.exists()
    assert hits() == 0
    assert list(kept.glob("jit*"))
    assert hits() > 0
    # A directory of the user's own, with nothing in it yet.
    assert hits(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == 0
    assert list((tmp_path / "mine").glob("jit*"))
    # A home that cannot be written.
    (tmp_path / "file").write_text("")
    assert hits(XDG_CACHE_HOME=str(tmp_path / "file")) == 0


JOINS = "from lemur_jax.cluster import hosts; hosts.choose_platform(1); hosts.join(2)"


@pytest.mark.parametrize("me", [0, 1])
def test_hosts_that_wait_in_vain_say_so_and_may_be_started_again(me):
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    environment = {**os.environ, **variables, "JAX_PLATFORMS": "cpu", "JAX_PROCESS_ID": str(me)}
    done = subprocess.run([sys.executable, "-c", JOINS], env=environment, capture_output=True, text=True)
    assert done.returncode == TRY_AGAIN
    (line,) = done.stderr.strip().splitlines()
    assert "did not all come together within 2 s" in line


def test_an_address_without_a_port_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host-0")
    with pytest.raises(UserError, match="'host-0': it must be HOST:PORT"):
        hosts.join()
