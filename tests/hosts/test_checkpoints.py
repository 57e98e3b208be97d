"""Two processes agree: on the step that a SIGTERM ends with, on a checkpoint that is damaged, on who reads, and on
what their own disks hold."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint import listing
from lemur_jax.checkpoint.manager import read_metadata, steps_in
from lemur_jax.telemetry.metrics import read_metrics
from tests.helpers.metadata_server import serving
from tests.hosts.conftest import STEPS
from tests.hosts.test_two_hosts import final_params


@pytest.fixture(scope="module")
def stopped(hosts_project, tmp_path_factory):
    """A workdir whose run got SIGTERM on host 1 after its first checkpoint, and what both hosts said."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    words = [*hosts_project.train_words(workdir), "--virtual-devices", "4"]
    processes = hosts_project.start(2, "-m", "lemur_jax.cli", *words)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (workdir / "checkpoints" / "3").exists():
        assert processes[1].poll() is None, processes[1].communicate()[0]
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGTERM)
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return workdir, said


def test_sigterm_on_one_host_ends_both_with_the_same_step_saved(stopped):
    workdir, said = stopped
    step = read_metadata(workdir)["step"]
    assert f"SIGTERM: step {step} is saved" in said[0]
    assert 3 <= step < STEPS
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    records = [record for record in read_metrics(workdir) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, step + 1))


def test_a_notice_of_the_cloud_ends_both_with_the_same_step_saved(hosts_project, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    words = [*hosts_project.train_words(workdir), "--virtual-devices", "4"]
    with serving() as cloud:
        monkeypatch.setenv("GCE_METADATA_HOST", cloud.host)
        processes = hosts_project.start(2, "-m", "lemur_jax.cli", *words)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not (workdir / "checkpoints" / "3").exists():
            assert processes[1].poll() is None, processes[1].communicate()[0]
            time.sleep(0.02)
        cloud.set("preempted", "TRUE")
        said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    # The first to hear of it stops both: the other may have saved and ended before it was told.
    assert any(
        "lemur train: this machine is taken away (instance/preempted: TRUE)\n" in lines for lines in said
    )
    assert f"SIGTERM: step {read_metadata(workdir)['step']} is saved" in said[0]


# A batch of an evaluation takes a second; a file tells of the first one.
SLOWLY_SCORED = """
import os, sys, time
from lemur_jax.cli import main
from lemur_jax.train import evaluate
batches = evaluate.held_out_batches
def slow(*args, **kwargs):
    for batch in batches(*args, **kwargs):
        open("scoring-" + os.environ["JAX_PROCESS_ID"], "w")
        time.sleep(1)
        yield batch
evaluate.held_out_batches = slow
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_on_one_host_ends_an_evaluation_on_both_and_the_next_start_makes_it(hosts_project, tmp_path):
    workdir = tmp_path / "run"
    words = [*hosts_project.train_words(workdir), "--config.eval.every_steps=4"]
    marks = [hosts_project.root / f"scoring-{host}" for host in (0, 1)]
    for mark in marks:
        mark.unlink(missing_ok=True)
    processes = hosts_project.start(2, "-c", SLOWLY_SCORED, *words, "--virtual-devices", "4")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not all(mark.exists() for mark in marks):
        assert processes[1].poll() is None, processes[1].communicate()[0]
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGTERM)
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "step 4: the held-out evaluation is given up" in said[0]
    assert "SIGTERM: step 4 is saved" in said[0]
    assert not [record for record in read_metrics(workdir) if record["kind"] == "eval"]
    hosts_project.lemur(2, *words)
    assert [record["step"] for record in read_metrics(workdir) if record["kind"] == "eval"] == [4, STEPS]


# Of two hosts, each with four devices: a tree that both rows of the mesh hold.
TREE = """
import os, pathlib, resource, signal, sys, threading, time
from lemur_jax.cluster import hosts
hosts.choose_platform(4)
hosts.join()
import jax
import jax.numpy as jnp
from lemur_jax.checkpoint import local, manager
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
tree = {"w": jax.jit(lambda: jnp.arange(8 * 65536.0).reshape(8, -1), out_shardings=rows)()}
metadata = manager.make_metadata(model={}, tokenizer_files={})
"""


# Each step is refused on one host, in one of the ways there are, and then saved again.
REFUSED = (
    TREE
    + """
from lemur_jax.checkpoint.metadata import LateJsonHandler
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
finalize, mkdir = LateJsonHandler.finalize, os.mkdir

def full(*_, **__):
    raise OSError(28, "No space left on device")

def refuse(way):
    if way == "write":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    elif way == "commit":
        LateJsonHandler.finalize = full
    else:
        os.mkdir = full

def mend():
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    LateJsonHandler.finalize, os.mkdir = finalize, mkdir
    hosts.wait_for_all("mended")

def say(line):
    print(line, flush=True)

here, ways = pathlib.Path(sys.argv[1]), [way.split(":") for way in sys.argv[3:]]
if sys.argv[2] == "local":
    saves = local.LocalCheckpoints(here / str(jax.process_index()), mesh, say)
    wait = saves._wait
else:
    saves = manager.Checkpoints(here, keep=2, max_failures=2, say=say)
    wait = saves.wait
with saves:
    for step, (way, host) in enumerate(ways, start=1):
        began = time.monotonic()
        if jax.process_index() == int(host):
            refuse(way)
        saves.save(2 * step, tree, tree, metadata)
        wait()
        mend()
        saves.save(2 * step + 1, tree, tree, metadata)
        wait()
        assert saves._manager.latest_step() == 2 * step + 1
        assert time.monotonic() - began < 60
time.sleep(1)
assert not [thread for thread in threading.enumerate() if type(thread).__module__.startswith("orbax.")]
"""
)

WRITE, DIRECTORY = ("write", "File too large"), ("directory", "No space left")


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("shared", [(1, *WRITE), (0, *WRITE), (0, "commit", "No space left"), (0, *DIRECTORY)]),
        ("local", [(1, *WRITE), (0, *WRITE), (1, *DIRECTORY), (0, *DIRECTORY)]),
    ],
)
def test_a_write_refused_on_one_host_is_known_to_all_at_once_and_tried_again(
    hosts_project, tmp_path, kind, refused
):
    """In the workdir, and on the host's own disk; Orbax alone would wait for that host for 5 or 20 minutes."""
    ways = [f"{way}:{host}" for host, way, _ in refused]
    processes = hosts_project.start(2, "-c", REFUSED, str(tmp_path), kind, *ways)
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for host, output in enumerate(said):
        lines = [line for line in output.splitlines() if line.startswith("WARNING")]
        assert len(lines) == len(refused), output
        for line, (on, _, reason) in zip(lines, refused, strict=True):
            assert reason in line
            assert kind == "local" or "failure 1 of at most 2" in line
            assert (f"host {on}" in line) == (on != host), line  # one's own error needs no name
    for path in [tmp_path / "0", tmp_path / "1"] if kind == "local" else [tmp_path]:
        assert steps_in(path)[1] == [7, 9]
        assert not list(path.glob("*tmp*"))


# A save to storage that takes 0.3 s to make a directory, of a run that has local checkpoints besides.
SLOW_DIRECTORIES = (
    TREE
    + """
here, mkdir, exists = pathlib.Path(sys.argv[1]), os.mkdir, os.path.exists

def slow(call):
    def slowed(path, *arguments, **options):
        if "tmp" in os.path.basename(path):
            time.sleep(0.3)
        return call(path, *arguments, **options)

    return slowed

with (
    manager.Checkpoints(here / "workdir") as saves,
    local.LocalCheckpoints(here / f"local{jax.process_index()}", mesh) as locals_,
):
    locals_.save(1, tree, tree, metadata)
    if jax.process_index() == 0:
        os.mkdir, os.path.exists = slow(mkdir), slow(exists)
    for step in (2, 4):
        saves.save(step, tree, tree, metadata)
        saves.wait()
        assert not saves.failed
        locals_.save(step + 1, tree, tree, metadata)
"""
)


def test_hosts_wait_for_the_directories_of_the_workdir_beside_local_checkpoints(hosts_project, tmp_path):
    processes = hosts_project.start(2, "-c", SLOW_DIRECTORIES, str(tmp_path))
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    table, whole = listing.table(tmp_path / "workdir")
    assert whole, table
    assert [steps_in(tmp_path / f"local{host}")[1] for host in (0, 1)] == [[3, 5], [3, 5]]


# SIGTERM comes to one host between a save, at a step in the thousands, and the next question whether to stop.
ASKED_ELSEWHERE = (
    TREE
    + """
from lemur_jax.cluster.preemption import Interruption
if sys.argv[2] == "local":
    saves = local.LocalCheckpoints(f"{sys.argv[1]}/{jax.process_index()}", mesh)
else:
    saves = manager.Checkpoints(sys.argv[1])
with saves, Interruption(0) as stop:
    for step in range(5000, 5020):
        assert not stop.reached()
        if step == 5003:
            saves.save(step, tree, tree, metadata)
            if jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(4)  # a step, in which JAX hears of the signal
            break
    for _ in range(600):
        if stop.reached():
            break
        time.sleep(0.1)
    assert stop.asked
"""
)


@pytest.mark.parametrize("kind", ["workdir", "local"])
def test_a_sigterm_beside_a_save_is_not_lost(hosts_project, tmp_path, kind):
    """Orbax asks JAX, too, whether to stop, with numbers of its own."""
    processes = hosts_project.start(2, "-c", ASKED_ELSEWHERE, str(tmp_path), kind)
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said


# The sixth step's save meets values that are not finite, which is known while it is written.
NOT_FINITE = """
import sys
import jax
from lemur_jax.checkpoint import manager
from lemur_jax.cli import main
save = manager.Checkpoints.save
def poisoned(self, step, params, *args, **kwargs):
    if step == 6:
        params = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf / 0, tree))(params)
    save(self, step, params, *args, **kwargs)
manager.Checkpoints.save = poisoned
sys.exit(main(sys.argv[1:]))
"""


def test_values_that_are_not_finite_end_both_hosts_and_the_checkpoint_before_stays(hosts_project, tmp_path):
    workdir = tmp_path / "run"
    words = [*hosts_project.train_words(workdir), "--virtual-devices", "4"]
    processes = hosts_project.start(2, "-c", NOT_FINITE, *words)
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "step 6 is not saved: params: embed/embedding has values that are not finite" in said[0]
    assert steps_in(workdir)[1] == [3]
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def truncate_newest(workdir):
    """Cuts the largest file of the newest checkpoint's parameters; gives its step and the one before."""
    previous, newest = steps_in(workdir)[1][-2:]
    data = (workdir / "checkpoints" / str(newest) / "params").rglob("d/*")
    largest = max(data, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    return newest, previous


def test_both_hosts_go_back_to_the_same_whole_checkpoint(hosts_project, stopped, tmp_path):
    """Whichever host meets the hole."""
    workdir, _ = stopped
    damaged = tmp_path / "damaged"
    shutil.copytree(workdir, damaged)
    if len(steps_in(damaged)[1]) == 1:  # the signal came with the first save: it is its own predecessor
        shutil.copytree(damaged / "checkpoints" / "3", damaged / "checkpoints" / "2")
    newest, previous = truncate_newest(damaged)
    chief, other = hosts_project.lemur(2, *hosts_project.train_words(damaged))
    assert "Exception ignored" not in chief + other
    assert f"Going on from step {previous}: {newest - previous} steps are lost" in chief
    assert f"resuming at step {previous}" in chief
    assert (damaged / "checkpoints" / f"damaged-{newest}").is_dir()
    records = [record["step"] for record in read_metrics(damaged) if record["kind"] == "train"]
    assert records == list(range(1, STEPS + 1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_params(damaged)))


@pytest.mark.slow
def test_the_run_that_went_back_ends_with_the_same_bits(hosts_project, stopped, tmp_path):
    straight, back = tmp_path / "straight", tmp_path / "back"
    for path in (straight, back):
        shutil.copytree(stopped[0], path)
    truncate_newest(back)
    for path in (straight, back):
        hosts_project.lemur(2, *hosts_project.train_words(path))
    jax.tree.map(np.testing.assert_array_equal, final_params(straight), final_params(back))
    assert json.loads((back / "config.json").read_text())["mesh"]["data"] == 1


@pytest.mark.slow
def test_one_host_reads_and_sends_to_the_other(hosts_project, stopped, tmp_path):
    """Two slices of one host each; a file that the reading one cannot read ends the run, loudly."""
    straight, sent, damaged = tmp_path / "straight", tmp_path / "sent", tmp_path / "damaged"
    for path in (straight, sent, damaged):
        shutil.copytree(stopped[0], path)
    words = ["--config.mesh.data=2", "--config.checkpoint.broadcast=True"]
    chief, _ = hosts_project.lemur(2, *hosts_project.train_words(sent), *words)
    assert "resuming at step" in chief
    hosts_project.lemur(2, *hosts_project.train_words(straight), words[0])
    jax.tree.map(np.testing.assert_array_equal, final_params(straight), final_params(sent))
    truncate_newest(damaged)
    arguments = [*hosts_project.train_words(damaged), *words, "--virtual-devices", "4"]
    processes = hosts_project.start(2, "-m", "lemur_jax.cli", *arguments)
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert processes[0].returncode == 2, said
    assert processes[1].returncode != 0, said
    assert "config.checkpoint.broadcast=False" in said[0]


def kill_after_a_local_checkpoint(project, words, disks):
    """Both hosts get SIGKILL when each has one of step 4 or later; gives the newest step of each."""
    processes = project.start(2, "-m", "lemur_jax.cli", *words, "--virtual-devices", "4")

    def newest():
        steps = [[int(path.name) for path in disk.glob("*/*") if path.name.isdigit()] for disk in disks]
        return [max((step for step in found), default=0) for found in steps]

    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and min(newest()) < 4:
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.communicate()
    return newest()


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["none", "one disk is new", "one file is damaged"])
def test_killed_hosts_go_on_from_their_own_disks_with_the_same_bits(hosts_project, tmp_path, harm):
    """Where one disk is new, the other host has the same shards (data 2) and sends them."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    words = ["--config.mesh.data=2", "--config.checkpoint.every_steps=100", "--config.train.steps=40"]
    hosts_project.lemur(2, *hosts_project.train_words(straight), *words)
    words += [f"--config.checkpoint.local_directory={tmp_path}/disk$JAX_PROCESS_ID"]
    words += ["--config.checkpoint.local_every_steps=2"]
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    newest = kill_after_a_local_checkpoint(hosts_project, [*hosts_project.train_words(run), *words], disks)
    if harm == "one disk is new":
        shutil.rmtree(disks[1])
    elif harm == "one file is damaged":
        files = [file for file in disks[1].glob("*/*/state/*/d/*") if file.parts[-5] == str(newest[1])]
        max(files, key=lambda file: file.stat().st_size).write_bytes(b"")
    said = hosts_project.lemur(2, *hosts_project.train_words(run), *words)
    assert "is taken from local checkpoints; the newest in the workdir is 0" in said[0]
    if harm == "one file is damaged":
        assert "cannot be read and is removed" in said[1]
    jax.tree.map(np.testing.assert_array_equal, final_params(straight, 40), final_params(run, 40))
    records = [record["step"] for record in read_metrics(run) if record["kind"] == "train"]
    assert records == list(range(1, 41))
    assert not [path for disk in disks for path in disk.glob("*/*")]  # the last checkpoint is in the workdir
