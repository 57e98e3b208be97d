"""A small project that tests train: its files, and `lemur train` in a process of its own that may be killed."""

import collections
import itertools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.checkpoint.reading import read_metadata, restore_params
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.config import load
from lemur_jax.data.manifest import Manifest
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import abstract_params, init_params
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.sweep.runner import building_once
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import train_sentencepiece
from lemur_jax.train import loop

STEPS = 24
# What a train record says about the clock and the machine, and not about the model: it differs between two
# runs that are otherwise the same.
CLOCK_KEYS = (
    "seconds", "data_wait_seconds", "tokens_per_second", "tokens_per_second_per_chip", "mfu", "hbm_bytes",
    "hbm_peak_bytes", "host_seconds", "sampling_seconds",
)  # fmt: skip

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
    config.eval.every_steps = 10
    config.checkpoint.every_steps = 3
    config.checkpoint.keep = 2
    config.log.every_steps = 2
    return config
"""


def write_store(path, tokenizer, documents):
    """Writes token ids by the name of a document into the store `.../task/split`."""
    task, split = path.parts[-2:]
    fields = {"task": task, "split": split, "source": task, "vocab_size": tokenizer.vocab_size}
    digests = {"tokenizer_digest": tokenizer.digest, "added_tokens": tokenizer.added_tokens}
    with StoreWriter(path, Manifest(**fields, **digests)) as writer:
        for name, ids in documents.items():
            writer.add([tokenizer.bos_id, *ids, tokenizer.eos_id], name, 3 * len(ids))


def random_documents(task, seed, ids=range(3, 300), count=60, lengths=(20, 200)):
    rng = np.random.default_rng(seed)
    sizes = (rng.integers(*lengths) for _ in range(count))
    return {f"{task}-{n}": rng.integers(ids.start, ids.stop, size).tolist() for n, size in enumerate(sizes)}


def make_project(root, changes="", ids=None):
    """Fills a directory with a config, to which lines may be added, a tokenizer and stores; `ids`: by task."""
    (root / "config.py").write_text(CONFIG.replace("    return config", f"{changes}    return config"))
    words = [f"value_{i} = {i} + other_{i % 7}" for i in range(400)]
    train_sentencepiece(words, root / "tokenizer", vocab_size=300)
    tokenizer = Tokenizer.load(root / "tokenizer")
    splits = [("code", "train"), ("text", "train"), ("text", "validation"), ("code", "validation")]
    for seed, (task, split) in enumerate(splits):
        documents = random_documents(task, seed, **({"ids": ids[task]} if ids else {}))
        write_store(root / "stores" / task / split, tokenizer, documents)
    return tokenizer


def write_model(path, model, tokenizer_files, seed=0, change=lambda leaf: leaf):
    """A checkpoint of fresh parameters, each changed so; returns them."""
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed)))
    params = jax.tree.map(change, params)
    write_params(path, params, make_metadata(model=model.to_dict(), tokenizer_files=tokenizer_files))
    return params


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    make_project(root)
    return root


def start(project, workdir, devices=1):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    words = ["train", "--config", "config.py", "--workdir", str(workdir), "--virtual-devices", str(devices)]
    return subprocess.Popen(
        [sys.executable, "-m", "lemur_jax", *words],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(project, workdir, devices=1):
    process = start(project, workdir, devices)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def final_params(workdir, steps=STEPS):
    metadata = read_metadata(workdir)
    assert metadata["step"] == steps
    wanted = abstract_params(DecoderConfig.from_dict(metadata["model"]))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), wanted)
    return jax.tree.map(np.asarray, restore_params(workdir, wanted))


@pytest.fixture(scope="session")
def undisturbed(project):
    workdir = project / "undisturbed"
    finish(project, workdir)
    return workdir


def kill_somewhere(project, workdir, checkpoints):
    """Starts a run and kills it a random fraction of a second after it has committed some checkpoints."""
    process = start(project, workdir)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        committed = max(
            (int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), default=0
        )
        if committed >= 3 * checkpoints:
            break
        time.sleep(0.005)
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


build_once = building_once()


@pytest.fixture
def train(project, monkeypatch, caplog):
    """`train(workdir, key=value, ...)` runs six steps of the project's config, and returns what is logged."""
    monkeypatch.chdir(project)

    def run(workdir, **options):
        caplog.clear()
        run_in_process(workdir, **options)
        # Not what other libraries log of earlier tests, e.g. asyncio when it frees a task that failed.
        own = (each for each in caplog.records if each.name.startswith("lemur_jax"))
        return [each.getMessage() for each in own if "progress" not in each.name]

    return run


def run_in_process(workdir, extend=False, **options):
    words = {"train.steps": 6, "eval.every_steps": 0, "checkpoint.keep": 100} | options
    config = load("config.py", [f"--config.{key}={value}" for key, value in words.items()])
    loop.train(config, workdir, build=build_once, extend=extend)


def asked_at(poll, request=lambda interruption, cause: interruption.request(cause)):
    """`Interruption.should_stop` where SIGTERM comes before it is called for the `poll`-th time."""
    polls = itertools.count(1)

    def should_stop(self):
        if next(polls) == poll:
            request(self, "SIGTERM")
        return self.requested

    return should_stop


def without_clock(records):
    """What two runs must have in common."""
    kept = [record for record in records if record["kind"] not in ("time", "start")]
    return [
        {key: value for key, value in record.items() if key.split("/")[0] not in CLOCK_KEYS}
        for record in kept
    ]


def documented():
    """Keys in docs/metrics.md by kind."""
    kinds = collections.defaultdict(set)
    text = (pathlib.Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        for kind in re.findall(r"kind: (\w+)", title):
            for cell in re.findall(r"^\| (`.*?) \|", body, re.MULTILINE):
                where = re.findall(r"\((\w+)\)", cell)
                if not where or kind in where:
                    kinds[kind] |= set(re.findall(r"`([^`]+)`", cell))
    return kinds
