"""Two and four real processes that share eight devices (gloo, 127.0.0.1) are one run: same batches, same losses."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.reading import steps_in
from lemur_jax.cluster.exit import TRY_AGAIN
from lemur_jax.telemetry.metrics import read_metrics
from tests.helpers.hosts import STEPS, Project, final_params, finish, wait_until
from tests.helpers.planted import plant
from tests.helpers.processes import hold_workdir

# Prints what this process holds of three batches: {"step row key": digest}.
BATCHES = """
import hashlib, json, os
from lemur_jax.cluster import hosts
hosts.choose_platform(int(os.environ["DEVICES"]))
hosts.join()
from lemur_jax.config import load
from lemur_jax.data.loader import Loader
from lemur_jax.data.mixture import open_mixture
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import batch_sharding
config = load("config.py")
mixture = open_mixture(
    config.data, Tokenizer.load(config.tokenizer.path), seed=config.seed, batch_rows=config.train.batch_rows
)
loader = Loader(mixture, batch_sharding(make_mesh(config.mesh)))
held = {}
for step in (0, 5, 1000):
    for key, array in loader.batch(step).items():
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            for row, values in enumerate(shard.data, first):
                held[f"{step} {row} {key}"] = hashlib.sha256(values.__array__().tobytes()).hexdigest()
print("HELD", json.dumps(held))
"""


def losses(workdir):
    """Losses of all records, whose steps must have neither gaps nor doubles."""
    records = read_metrics(workdir)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [STEPS]
    return [r["loss"] for r in records if r["kind"] not in ("time", "start")]


# Where a model is named, this host's own is.
OWN_MODEL = """
sys.argv = [word.replace("model", f"host-{host}") if word.endswith("model") else word for word in sys.argv]
"""


@pytest.fixture(scope="module")
def one(hosts_project):
    workdir = hosts_project.root / "one"
    hosts_project.lemur(1, *hosts_project.train_words(workdir))
    return workdir


@pytest.fixture(scope="module")
def two(hosts_project):
    """A run of two hosts, and what each printed."""
    workdir = hosts_project.root / "two"
    return workdir, hosts_project.lemur(2, *hosts_project.train_words(workdir))


def held(hosts_project, hosts):
    outputs = finish(hosts_project.start(hosts, "-c", BATCHES))
    return [json.loads(output.split("HELD ")[1].splitlines()[0]) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
def test_batches_are_identical_and_each_host_reads_its_own_rows(hosts_project, hosts):
    (whole,) = held(hosts_project, 1)
    parts = held(hosts_project, hosts)
    assert sum(len(part) for part in parts) == len(whole)
    assert {row: digest for part in parts for row, digest in part.items()} == whole


def test_two_hosts_train_as_one_and_one_of_them_writes(hosts_project, one, two):
    workdir, (primary, other) = two
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-5)
    assert "8 cpu devices" in primary
    assert "held-out text" in primary
    assert "loss" in primary
    assert not [line for line in other.splitlines() if "loss" in line or "tokens" in line]
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "running.lock",
    }
    jax.tree.map(
        lambda mine, theirs: np.testing.assert_allclose(mine, theirs, atol=1e-4),
        final_params(workdir),
        final_params(one),
    )


def export(hosts_project, hosts, workdir, directory):
    """All hosts are told to export; they must make what one makes alone."""
    made = []
    for count in (hosts, 1):
        target = directory / f"hf-{count}"
        words = ["-m", "lemur_jax", "export-hf", str(workdir), str(target)]
        finish(hosts_project.start(count, *words))
        made.append({path.name: path.read_bytes() for path in target.iterdir()})
    assert made[0] == made[1]
    assert "model.safetensors" in made[0]


# The pieces in which the library that connects CPU hosts prints. Its threads mix them with each other's.
GLOO = re.compile(
    r"(\[Gloo\] Rank | is connected to | peer ranks\. Expected number of connected peer ranks is : |\d+|\n)*"
)


def test_two_hosts_generate_and_one_of_them_exports(hosts_project, two, tmp_path):
    workdir, _ = two
    words = ["generate", "--checkpoint", str(workdir), "--prompt", "value_1 =", "--max-new-tokens", "8"]
    primary, other = hosts_project.lemur(2, *words, errors=subprocess.PIPE)
    (alone,) = hosts_project.lemur(1, *words, errors=subprocess.PIPE)
    assert alone.startswith("value_1 =")
    assert primary.endswith(alone)
    assert GLOO.fullmatch(primary.removesuffix(alone))
    assert GLOO.fullmatch(other)
    export(hosts_project, 2, workdir, tmp_path)


@pytest.mark.slow
def test_each_host_reads_its_own_part_of_an_exported_model(hosts_project, two, tmp_path):
    model = tmp_path / "model"
    finish(hosts_project.start(1, "-m", "lemur_jax", "export-hf", str(two[0]), str(model)))
    reference = tmp_path / "reference.json"
    words = ["smoke", "--checkpoint", str(model), "--mesh"]
    hosts_project.lemur(1, *words, "fsdp=8", "--write-reference", str(reference))
    primary, other = hosts_project.lemur(2, *words, "fsdp=4,tensor=2", "--reference", str(reference))
    assert "192 tokens equal the reference's" in primary
    assert "tokens" not in other


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "reason"), [("serve", "serve from one host"), ("chat", "give --prompt")])
def test_what_people_type_into_needs_one_host(hosts_project, two, verb, reason):
    words = [verb, "--checkpoint", str(two[0]), "--virtual-devices", "4"]
    said = finish(hosts_project.start(2, "-m", "lemur_jax", *words), 2, 2)
    assert reason in said[0], said


def zeros(weights):
    """Another model of the same shape: all tensors of a safetensors file are 0."""
    start = 8 + int.from_bytes(weights[:8], "little")
    return weights[:start] + bytes(len(weights) - start)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights[:-8], "lemur: host 1 failed: UserError: .* is not a whole safetensors file"),
        (zeros, "the Hugging Face model that is read differs between hosts: host 1"),
    ],
    ids=["damaged", "another model"],
)
def test_what_one_host_refuses_ends_generation_on_both(hosts_project, two, tmp_path, change, reason):
    """Each host reads its own copy of the model, and that of host 1 has other weights."""
    workdir, _ = two
    whole = tmp_path / "host-0"
    finish(hosts_project.start(1, "-m", "lemur_jax", "export-hf", str(workdir), str(whole)))
    shutil.copytree(whole, tmp_path / "host-1")
    weights = tmp_path / "host-1" / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    words = ["smoke", "--checkpoint", str(tmp_path / "model"), "--mesh", "fsdp=8"]
    said = finish(hosts_project.patched(OWN_MODEL, *words), 2, 2)
    assert re.search(reason, said[0]), said


def kill(hosts_project, workdir, how, victim=1):
    """Lets a run of two hosts save once, hits one, and gives what the other said and how long it took."""
    processes = hosts_project.start(
        2, "-m", "lemur_jax", *hosts_project.train_words(workdir), "--virtual-devices", "4"
    )
    wait_until((workdir / "checkpoints" / "3").exists, processes[1])
    os.kill(processes[victim].pid, how)
    hit = time.monotonic()
    said, _ = processes[1 - victim].communicate(timeout=240)
    seconds = time.monotonic() - hit
    processes[victim].kill()
    processes[victim].communicate()
    return processes[1 - victim].returncode, said, seconds


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_lost_host_ends_the_run_by_name_and_the_relaunch_is_exact(hosts_project, two, one, how, tmp_path):
    workdir = tmp_path / "run"
    code, said, seconds = kill(hosts_project, workdir, how)
    assert code == TRY_AGAIN, said
    assert "has not been heard of for 10 s" in said
    assert "host 1 (" in said
    assert seconds < 10 + 15  # lost_seconds, two beats, and a busy machine
    elsewhere = {hosts: tmp_path / str(hosts) for hosts in (1, 4)}
    for copy in elsewhere.values():
        shutil.copytree(workdir, copy)
    primary, _ = hosts_project.lemur(2, *hosts_project.train_words(workdir))
    assert "resuming at step" in primary
    jax.tree.map(np.testing.assert_array_equal, final_params(workdir), final_params(two[0]))
    if how == signal.SIGSTOP:  # the slow one of the two
        for hosts, copy in elsewhere.items():
            primary, *_ = hosts_project.lemur(hosts, *hosts_project.train_words(copy))
            assert "resuming at step" in primary
            np.testing.assert_allclose(losses(copy), losses(one), rtol=1e-5)


@pytest.mark.slow
def test_death_of_host_0_is_named_too(hosts_project, tmp_path):
    code, said, _ = kill(hosts_project, tmp_path / "run", signal.SIGKILL, victim=0)
    assert code == -signal.SIGABRT, said
    assert "terminating process" in said.lower(), said


@pytest.mark.slow
def test_four_hosts_train_and_export_as_one(hosts_project, one, tmp_path):
    hosts_project.lemur(4, *hosts_project.train_words(tmp_path / "run"))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=1e-5)
    export(hosts_project, 4, tmp_path / "run", tmp_path)


# A host whose data are slow: each of its batches takes 2 s longer.
SLOW = """
import time
from lemur_jax.data.loader import Loader
batch = Loader.batch
def late(self, step):
    time.sleep(2 * (host == "1"))
    return batch(self, step)
Loader.batch = late
"""


@pytest.mark.slow
def test_straggler_is_seen_in_the_metrics(hosts_project, tmp_path):
    finish(hosts_project.patched(SLOW, *hosts_project.train_words(tmp_path / "run")))
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    # The slow host has told nothing yet where the other writes its first.
    both = [record for record in records if "host_seconds/1" in record]
    assert records[-1] in both
    # All of them: where a save takes long, the slow host may have caught up behind it.
    first, second = (sum(record[f"host_seconds/{host}"] for record in both) for host in (0, 1))
    assert second > first


@pytest.mark.slow
def test_two_hosts_skip_and_roll_back_as_one(hosts_project, tmp_path):
    root = tmp_path / "poisoned"
    shutil.copytree(hosts_project.root, root, ignore=shutil.ignore_patterns("one", "two"))
    shutil.rmtree(root / "stores/code/train")
    plant(root)
    poisoned = Project.__new__(Project)
    poisoned.root = root
    for hosts in (1, 2):
        poisoned.lemur(hosts, *poisoned.train_words(tmp_path / str(hosts)), "--config.train.steps=24")
    alone, both = (
        [record for record in read_metrics(tmp_path / name) if record["kind"] in ("skip", "rollback")]
        for name in ("1", "2")
    )
    assert {record["kind"] for record in alone} == {"skip", "rollback"}
    assert [(r["kind"], r["step"], r.get("to")) for r in both] == [
        (r["kind"], r["step"], r.get("to")) for r in alone
    ]
    assert [sorted(r.get("documents", ())) for r in both] == [sorted(r.get("documents", ())) for r in alone]


# Files tell how far a host has come.
TOLD = """
from lemur_jax.train import loop
def told(name, call):
    def first(*args, **options):
        open(os.environ["MARKS"] + "/" + name + host, "w")
        return call(*args, **options)
    return first
loop.barrier = told("waiting", loop.barrier)
loop.Saves = told("saves", loop.Saves)
"""


@pytest.mark.slow
def test_all_hosts_wait_where_another_run_has_the_workdir(hosts_project, tmp_path, monkeypatch):
    """Not in a collective for host 0, which alone looks for that run: there it would be missed after half a minute."""
    run, marks = tmp_path / "run", tmp_path / "marks"
    run.mkdir()
    marks.mkdir()
    monkeypatch.setenv("MARKS", str(marks))
    other = hold_workdir(run)
    processes = hosts_project.patched(TOLD, *hosts_project.train_words(run))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(marks.glob("*1")):
        time.sleep(0.1)
    time.sleep(2)
    assert [path.name for path in marks.iterdir()] == ["waiting1"]
    other.kill()
    other.communicate()
    primary, _ = finish(processes)
    assert f"another `lemur train` is writing to {run}: waiting for its end" in primary
    assert steps_in(run)[1][-1] == STEPS


def test_hosts_with_other_configs_are_refused(hosts_project, tmp_path):
    code = "sys.argv.append('--config.seed=' + host)"
    outputs = finish(hosts_project.patched(code, *hosts_project.train_words(tmp_path / "run")), 2, 2)
    assert "the config differs between hosts: host 1" in outputs[0] + outputs[1]
    assert not (tmp_path / "run").exists()


def test_doctor_looks_at_both_hosts(hosts_project, tmp_path):
    words = ["doctor", "--config", "config.py", "--workdir", str(tmp_path / "run")]
    primary, other = hosts_project.lemur(2, *words)
    assert "verdict: 2 hosts ready" in primary
    assert "written, read and shared" in primary
    assert re.search(r"ok    collectives +all-reduce of 1 MiB in [\d.]+ ms = [\d.]+ GB/s a device", primary)
    assert "verdict" not in other
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_doctor_says_which_host_cannot_read_the_first_parameters(hosts_project, two, tmp_path):
    workdir, _ = two
    shutil.copytree(workdir, tmp_path / "host-0")
    words = ["doctor", "--config", "config.py", "--workdir", str(tmp_path / "run")]
    said = finish(
        hosts_project.patched(OWN_MODEL, *words, f"--config.init.checkpoint={tmp_path}/model"), 2, 2
    )
    (line,) = [line for line in said[0].splitlines() if line.startswith("FAIL  first parameters")]
    assert "host 1" in line
    assert f"no checkpoint directory at {tmp_path}/host-1" in line
    assert "host 0" not in line
    assert "all-reduce of 1 MiB" in said[0]


# A verb in which one host ends otherwise than by a mistake of the user's, while the other is in a collective.
ENDS = """
import argparse, sys
from lemur_jax import cli
from lemur_jax.cluster import coordination, hosts
from lemur_jax.cluster.watchdog import host_watchdog
hosts.choose_platform(1)
kind, bad = sys.argv[1], int(sys.argv[2])

def run(args):
    hosts.join(60, 20)
    import jax
    jax.devices()
    with host_watchdog(20):
        coordination.barrier("go", 300)
        if jax.process_index() == bad:
            raise KeyboardInterrupt if kind == "interrupted" else RuntimeError("unforeseen")
        hosts.any_host(True)

class Parser:
    def parse_known_args(self, arguments):
        return argparse.Namespace(run=run, takes_config=False, verb="train"), []

cli._parser = lambda: (Parser(), ["train"])
sys.exit(cli.main(["train"]))
"""


@pytest.mark.parametrize(
    ("kind", "status", "bad"),
    [
        ("unforeseen", 1, 0),
        *(pytest.param("interrupted", 130, bad, marks=pytest.mark.slow) for bad in (0, 1)),
        pytest.param("unforeseen", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_a_host_that_is_interrupted_or_fails_ends_with_its_own_status(hosts_project, kind, status, bad):
    """Not with that of an abort in the goodbye of `jax.distributed`, and the other names it."""
    statuses = [status, TRY_AGAIN] if bad == 0 else [TRY_AGAIN, status]
    said = finish(hosts_project.start(2, "-c", ENDS, kind, str(bad)), *statuses)
    assert ("RuntimeError: unforeseen" in said[bad]) == (kind == "unforeseen"), said
    assert f"host {bad}" in said[1 - bad], said
