"""Two processes agree: on the last step of a run, on a save that fails, on a damaged checkpoint, on who reads."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.reading import read_metadata, steps_in
from lemur_jax.cluster.exit import TRY_AGAIN
from lemur_jax.telemetry.metrics import read_metrics
from tests.helpers.hosts import STEPS, final_params, finish, wait_until
from tests.helpers.metadata_server import serving


@pytest.fixture(scope="module")
def stopped(hosts_project, tmp_path_factory):
    """A workdir whose run got a notice of the cloud after its first checkpoint, and what both hosts said."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    words = [*hosts_project.train_words(workdir), "--virtual-devices", "4"]
    with pytest.MonkeyPatch.context() as patch, serving() as cloud:
        patch.setenv("GCE_METADATA_HOST", cloud.host)
        processes = hosts_project.start(2, "-m", "lemur_jax", *words)
        wait_until(lambda: (workdir / "checkpoints" / "3").exists(), processes[1])
        cloud.set("preempted", "TRUE")
        said = finish(processes)
    return workdir, said


def test_a_notice_of_the_cloud_ends_both_with_the_same_step_saved(stopped):
    workdir, said = stopped
    step = read_metadata(workdir)["step"]
    # The first to hear of it stops both: the other may have saved and ended before it was told.
    assert any("this machine is taken away (instance/preempted: TRUE)\n" in lines for lines in said)
    assert f"SIGTERM: step {step} is saved" in said[0]
    assert 3 <= step < STEPS
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    records = [record for record in read_metrics(workdir) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, step + 1))


# A batch of an evaluation takes a second; a file tells of the first one.
SLOWLY_SCORED = """
import time
from lemur_jax.train import evaluate
batches = evaluate.held_out_batches
def slow(*args, **kwargs):
    for batch in batches(*args, **kwargs):
        open("scoring-" + host, "w")
        time.sleep(1)
        yield batch
evaluate.held_out_batches = slow
"""


@pytest.mark.slow
def test_sigterm_on_one_host_ends_an_evaluation_on_both_and_the_next_start_makes_it(hosts_project, tmp_path):
    workdir = tmp_path / "run"
    words = [*hosts_project.train_words(workdir), "--config.eval.every_steps=4"]
    marks = [hosts_project.root / f"scoring-{host}" for host in (0, 1)]
    for mark in marks:
        mark.unlink(missing_ok=True)
    processes = hosts_project.patched(SLOWLY_SCORED, *words)
    wait_until(lambda: all(mark.exists() for mark in marks), processes[1])
    os.kill(processes[1].pid, signal.SIGTERM)
    said = finish(processes)
    assert "step 4: held-out evaluation stopped; repeated at the next start" in said[0]
    assert "SIGTERM: step 4 is saved" in said[0]
    assert not [record for record in read_metrics(workdir) if record["kind"] == "eval"]
    hosts_project.lemur(2, *words)
    assert [record["step"] for record in read_metrics(workdir) if record["kind"] == "eval"] == [4, STEPS]


# SIGTERM comes to one host between a save, at a step in the thousands, and the next question whether to stop.
ASKED_ELSEWHERE = """
import os, signal, sys, time
from lemur_jax.cluster import hosts
hosts.choose_platform(4)
hosts.join()
import jax
import jax.numpy as jnp
from lemur_jax.checkpoint import manager
from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.cluster.preemption import Interruption
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
tree = {"w": jax.jit(lambda: jnp.arange(8 * 65536.0).reshape(8, -1), out_shardings=rows)()}
metadata = make_metadata(model={}, tokenizer_files={})
with manager.Checkpoints(sys.argv[1]) as saves, Interruption(0) as stop:
    for step in range(5000, 5004):
        assert not stop.should_stop()
    saves.save(step, tree, tree, metadata)
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)  # a step, in which JAX hears of the signal
    for _ in range(600):
        if stop.should_stop():
            break
        time.sleep(0.1)
    print(f"asked to stop: {stop.requested}")
"""


@pytest.mark.slow
def test_a_sigterm_beside_a_save_is_not_lost(hosts_project, tmp_path):
    """Orbax would ask JAX, too, whether to stop, with numbers of its own."""
    said = finish(hosts_project.start(2, "-c", ASKED_ELSEWHERE, str(tmp_path)))
    assert all("asked to stop: True" in output for output in said)


# The save of the sixth step is refused on one host: a file too large, or a directory that cannot be made.
REFUSED = """
import resource, signal
from lemur_jax.checkpoint import manager
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save, mkdir = manager.Checkpoints.save, os.mkdir
def refuse(path, *_, **__):
    raise OSError(28, "No space left on device")
def refused(self, step, *args, **kwargs):
    if step == 6 and host == os.environ["REFUSED"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        os.mkdir = refuse
    save(self, step, *args, **kwargs)
manager.Checkpoints.save = refused
"""


@pytest.mark.slow  # on one host: tests/checkpoint/test_policies.py
@pytest.mark.parametrize("host", [0, 1])
def test_a_save_refused_on_one_host_ends_both_and_the_same_command_goes_on(
    hosts_project, tmp_path, monkeypatch, host
):
    """Orbax alone would keep the other waiting for it."""
    run = tmp_path / "run"
    words = hosts_project.train_words(run)
    monkeypatch.setenv("REFUSED", str(host))
    said = finish(hosts_project.patched(REFUSED, *words), TRY_AGAIN, TRY_AGAIN)
    (verdict,) = [line for line in said[1 - host].splitlines() if line.startswith("lemur: ")]
    assert verdict.startswith(f"lemur: host {host} failed: the checkpoint of step 6 could not be saved")
    assert steps_in(run)[1] == [3]
    primary, _ = hosts_project.lemur(2, *words)
    assert "resuming at step 3" in primary
    assert steps_in(run)[1] == [3, 6, STEPS]
    assert not list((run / "checkpoints").glob("*tmp*"))


# The sixth step's save meets values that are not finite, which is known while it is written.
NOT_FINITE = """
import jax
from lemur_jax.checkpoint import manager
save = manager.Checkpoints.save
def poisoned(self, step, params, *args, **kwargs):
    if step == 6:
        params = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf / 0, tree))(params)
    save(self, step, params, *args, **kwargs)
manager.Checkpoints.save = poisoned
"""


@pytest.mark.slow
def test_values_that_are_not_finite_end_both_hosts_and_the_checkpoint_before_stays(hosts_project, tmp_path):
    workdir = tmp_path / "run"
    said = finish(hosts_project.patched(NOT_FINITE, *hosts_project.train_words(workdir)), 2, 2)
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
    primary, _ = hosts_project.lemur(2, *hosts_project.train_words(damaged))
    assert f"Going on from step {previous}: {newest - previous} steps are lost" in primary
    assert f"resuming at step {previous}" in primary
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
    primary, _ = hosts_project.lemur(2, *hosts_project.train_words(sent), *words)
    assert "resuming at step" in primary
    hosts_project.lemur(2, *hosts_project.train_words(straight), words[0])
    jax.tree.map(np.testing.assert_array_equal, final_params(straight), final_params(sent))
    truncate_newest(damaged)
    arguments = [*hosts_project.train_words(damaged), *words, "--virtual-devices", "4"]
    processes = hosts_project.start(2, "-m", "lemur_jax", *arguments)
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert processes[0].returncode == 2, said
    assert processes[1].returncode != 0, said
    assert "config.checkpoint.broadcast=False" in said[0]


def test_hosts_with_other_workdirs_are_refused(hosts_project, tmp_path):
    """As where each has its own disk: each checkpoint would lie on both, one half here and one there."""
    words = hosts_project.train_words(tmp_path / "run")
    outputs = finish(hosts_project.patched("sys.argv[5] += host", *words), 2, 2)
    reason = "the workdir (all hosts must see the same files) differs between hosts: host 1"
    assert reason in outputs[0] + outputs[1]
    assert not list(tmp_path.rglob("checkpoints"))
    assert not list(tmp_path.rglob(".shared-*"))


@pytest.mark.slow
def test_hosts_with_other_data_are_refused(hosts_project, tmp_path):
    for host in range(2):
        shutil.copytree(
            hosts_project.root, tmp_path / f"host-{host}", ignore=shutil.ignore_patterns("one", "two")
        )
    store = tmp_path / "host-1/stores/code/train"
    shutil.rmtree(store)
    shutil.copytree(tmp_path / "host-1/stores/code/validation", store)
    code = f"os.chdir({str(tmp_path)!r} + '/host-' + host)"
    outputs = finish(hosts_project.patched(code, *hosts_project.train_words(tmp_path / "run")), 2, 2)
    assert "the data in config.data.stores differs between hosts: host 1" in outputs[0] + outputs[1]
    assert not (tmp_path / "run").exists()
