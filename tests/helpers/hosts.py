"""A small project, and `lemur` on several processes that form one mesh on this machine."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from lemur_jax.checkpoint.manager import read_metadata, restore_params
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import abstract_params
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import train_sentencepiece
from tests.helpers.runs import write_store

STEPS = 8

CONFIG = f"""
from lemur_jax.config import default_config
from lemur_jax.models.presets import preset

def get_config(arg=""):
    config = default_config(preset("tiny"))
    config.compute.dtype = "float32"
    config.tokenizer.path = "tokenizer"
    config.data.stores = "stores"
    config.data.sequence_length = 64
    config.data.sources = {{
        "code": {{"share": 10.0, "packing": "concat", "max_epochs": 0.0}},
        "text": {{"share": 1.0, "packing": "concat", "max_epochs": 0.0}},
    }}
    config.train.steps = {STEPS}
    config.train.batch_rows = 8
    config.optimizer.learning_rate = 1e-2
    config.eval.tasks = ("text",)
    config.checkpoint.every_steps = 3
    config.log.every_steps = 2
    config.hosts.lost_seconds = 10
    return config
"""


class Project:
    """A directory with a config, a tokenizer and stores.

    Attributes:
      root: the directory.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        (root / "config.py").write_text(CONFIG)
        words = [f"value_{i} = {i} + other_{i % 7}" for i in range(400)]
        train_sentencepiece(words, root / "tokenizer", vocab_size=300)
        tokenizer = Tokenizer.load(root / "tokenizer")
        for seed, (task, split) in enumerate([("code", "train"), ("text", "train"), ("text", "validation")]):
            write_store(root / "stores" / task / split, tokenizer, task, split, seed)

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
        words = ("-m", "lemur_jax.cli", *words, "--virtual-devices", str(8 // hosts))
        return finish(self.start(hosts, *words, errors=errors))

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


def final_params(workdir, steps=STEPS):
    metadata = read_metadata(workdir)
    assert metadata["step"] == steps
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        abstract_params(DecoderConfig.from_dict(metadata["model"])),
    )
    return jax.tree.map(np.asarray, restore_params(workdir, wanted))


def wait_until(condition, process: subprocess.Popen) -> None:
    """Waits until `condition()` holds; fails where `process` ends before, or after four minutes."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
