"""A small project, and `lemur` on several processes that form one mesh on this machine."""

import functools
import os
import pathlib
import socket
import subprocess
import sys
import time

from tests.helpers import runs

STEPS = 8
CHANGES = f"""    config.train.steps = {STEPS}
    config.eval.every_steps = 0
    config.checkpoint.keep = 3
    config.hosts.lost_seconds = 10
"""
final_params = functools.partial(runs.final_params, steps=STEPS)


class Project:
    """A directory with a config, a tokenizer and stores.

    Attributes:
      root: the directory.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        runs.make_project(root, CHANGES)

    def start(self, hosts: int, *words: str, errors: int = subprocess.STDOUT) -> list[subprocess.Popen]:
        """`python WORDS` on `hosts` processes that share eight devices; their standard errors go to `errors`."""
        port = free_port()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        environment["DEVICES"] = str(8 // hosts)
        if hosts > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(hosts)}
        return [
            subprocess.Popen(
                [sys.executable, *words],
                cwd=self.root,
                env={**environment, "JAX_PROCESS_ID": str(host)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                pipesize=1 << 20,  # the outputs are read one after the other
            )
            for host in range(hosts)
        ]

    def lemur(self, hosts: int, *words: str, errors: int = subprocess.STDOUT) -> list[str]:
        """The outputs of `lemur WORDS`, one a host."""
        words = ("-m", "lemur_jax", *words, "--virtual-devices", str(8 // hosts))
        return finish(self.start(hosts, *words, errors=errors))

    def patched(self, code: str, *words: str) -> list[subprocess.Popen]:
        """Starts `lemur WORDS` on two hosts. Each runs `code` first, in which `host` is its index, "0" or "1"."""
        begin = "import os, sys\nfrom lemur_jax.cli import main\nhost = os.environ['JAX_PROCESS_ID']\n"
        end = "\nsys.exit(main(sys.argv[1:]))"
        return self.start(2, "-c", begin + code + end, *words, "--virtual-devices", "4")

    def train_words(self, workdir: pathlib.Path) -> list[str]:
        return ["train", "--config", "config.py", "--workdir", str(workdir)]


def finish(processes: list[subprocess.Popen], *statuses: int) -> list[str]:
    """The outputs of processes that end with these exit statuses, by default with 0."""
    outputs = [process.communicate(timeout=300) for process in processes]
    ended = [process.returncode for process in processes]
    assert ended == (list(statuses) or [0] * len(ended)), outputs
    return [output for output, _ in outputs]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, process: subprocess.Popen) -> None:
    """Waits until `condition()` holds; fails where `process` ends before, or after four minutes."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
