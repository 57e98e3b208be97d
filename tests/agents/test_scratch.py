"""No way of ending leaves temporary directories behind, and those of a killed process go with the next one."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

# A box in use, a server's directory, and a line when both are there.
PROGRAM = """
import sys, threading
from lemur_jax.agents.sandbox import run
from lemur_jax.agents.scratch import make_directory
(make_directory("db-") / "socket").touch()
threading.Thread(target=run, args=(["sleep", "60"],), daemon=True).start()
print(flush=True)
sys.stdin.readline()
raise SystemError
"""


def start(program: list[str], directory: pathlib.Path) -> subprocess.Popen:
    pipe = subprocess.PIPE
    environment = os.environ | {"TMPDIR": str(directory), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.mark.parametrize("number", [None, signal.SIGINT])
def test_an_error_and_ctrl_c_leave_nothing(tmp_path, number):
    with start([sys.executable, "-c", PROGRAM], tmp_path) as process:
        assert process.stdout.readline() == "\n"
        assert len(list(tmp_path.glob("lemur-*/db-*"))) == 1
        process.send_signal(number) if number else process.stdin.write("\n")
        process.communicate()
    assert process.returncode
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_leaves_goes_with_the_next_but_not_what_is_in_use(tmp_path):
    words = [sys.executable, "-c", PROGRAM]
    with start(words, tmp_path) as living, start(words, tmp_path) as killed:
        assert (living.stdout.readline(), killed.stdout.readline()) == ("\n", "\n")
        left = set(tmp_path.iterdir())
        assert len(left) == 2
        killed.kill()
        killed.wait()
        assert set(tmp_path.iterdir()) == left
        subprocess.run(
            [sys.executable, "-c", "from lemur_jax.agents.sandbox import run; run(['true'])"],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            check=True,
        )
        (kept,) = tmp_path.iterdir()
        assert list(kept.glob("db-*/socket"))
        living.communicate("\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_an_evaluation_that_is_terminated_leaves_nothing(tmp_path):
    pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        words = ["eval", "--agents", "bash", "--limit", "1", "--endpoint", url, "--endpoint-model", "x"]
        with start([sys.executable, "-m", "lemur_jax", *words], tmp_path) as process:
            asked, _ = listening.accept()
            assert list(tmp_path.glob("lemur-*/bash-*"))
            process.terminate()
            asked.close()
            listening.close()  # the request that is waited for fails
            process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
