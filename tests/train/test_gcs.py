"""A run whose workdir lies on gs://, an emulator of its server: stopped and resumed, it is the run of a disk."""

import os
import subprocess
import sys

import pytest

from lemur_jax.telemetry.metrics import read_metrics
from tests.helpers.runs import without_clock

# Trains into the first place, with SIGTERM after step 4, then goes on; copies the metrics.
SCRIPT = """
import os, signal, sys
from etils import epath
from lemur_jax.cli import main
from lemur_jax.cluster.preemption import Interruption

workdir = epath.Path(sys.argv[1])
words = ["train", "--config", "config.py", "--workdir", str(workdir), "--config.train.steps=6"]
should_stop, polls, seen = Interruption.should_stop, [], set()

def terminated(self):
    polls.append(self)
    seen.update(path.name for path in workdir.iterdir())
    if len(polls) == 4:
        self.request("SIGTERM")
    return should_stop(self)

Interruption.should_stop = terminated
assert main(words) == 0
assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "4"]
assert ("running.lease" in seen) == (sys.argv[1].startswith("gs:"))
assert not (workdir / "running.lease").exists()
assert main(words) == 0
assert main(["checkpoints", str(workdir)]) == 0
epath.Path(sys.argv[2]).write_text((workdir / "metrics.jsonl").read_text())
"""


@pytest.mark.slow
def test_a_run_on_gs_is_that_of_a_disk(emulator, project, tmp_path):
    before = sorted(os.listdir(project))
    found = {}
    for name, workdir in (("gs", "gs://bucket/run"), ("disk", str(tmp_path / "run"))):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, workdir, str(tmp_path / name / "metrics.jsonl")],
            env=emulator | {"PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=project,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert "resuming at step 4" in done.stdout
        assert done.stdout.count("verified (params, optimizer)") == 2
        found[name] = without_clock(read_metrics(tmp_path / name))
    assert found["gs"] == found["disk"]
    assert [record["step"] for record in found["gs"] if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert sorted(os.listdir(project)) == before  # nothing lies in a directory named gs:
