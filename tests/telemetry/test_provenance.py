"""What a run records of its commit, host and versions."""

import io
import pathlib
import re
import subprocess
import tarfile

import jax
import pytest

from lemur_jax.telemetry import provenance
from lemur_jax.telemetry.metrics import MetricsWriter, read_metrics
from lemur_jax.telemetry.provenance import git_commit, start_record

ROOT = pathlib.Path(__file__).parents[2]


def test_a_start_can_be_written_and_read(tmp_path):
    record = start_record(7)
    assert (record["step"], record["kind"], record["devices"]) == (7, "start", "8 × cpu")
    assert f"jax {jax.__version__}" in record["versions"]
    assert record["host"]
    with MetricsWriter(tmp_path) as writer:
        writer.write(record)
    assert read_metrics(tmp_path) == [record]


def test_the_commit_is_that_of_the_checkout_and_survives_git_archive():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert re.fullmatch(rf"{head}(-dirty)?", git_commit())
    command = [*git, "archive", "HEAD", "lemur_jax/commit.txt"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        assert files.extractfile("lemur_jax/commit.txt").read().decode().strip() == head


def test_a_copy_that_is_installed_inside_a_checkout_has_no_commit(tmp_path, monkeypatch):
    """As `.venv` in a clone: git would give the commit of the checkout around it."""
    package = tmp_path / ".venv/lemur_jax"
    (package / "telemetry").mkdir(parents=True)
    (package / "commit.txt").write_text("$Format:%H$")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in ("init -q", "commit -q --allow-empty -m first"):
        subprocess.run([*git, *words.split()], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "telemetry/provenance.py"))
    assert git_commit() is None
    subprocess.run([*git, "add", "."], check=True)
    assert git_commit().endswith("-dirty")
