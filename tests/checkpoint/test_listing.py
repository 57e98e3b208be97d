"""The table of checkpoints, whole and damaged, and the difference of their configs."""

import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.checkpoint import listing, manager
from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    # In a URL, as TensorStore takes them, these characters mean something else.
    path = tmp_path_factory.mktemp("run ü #1 of 5%20?") / "checkpoints"
    trees = [{"w": np.random.default_rng(seed).normal(size=(256, 256))} for seed in (0, 1)]
    params, optimizer = jax.tree.map(jnp.float32, trees)
    with manager.Checkpoints(path) as checkpoints:
        for step, rows in ((3, 8), (6, 16)):
            config = {"train": {"batch_rows": rows, "steps": 9}, "seed": 1}
            metadata = make_metadata(model={}, tokenizer_files={}, config=config)
            checkpoints.save(step, params, optimizer, metadata)
    return path.parent


def test_verifies_every_byte(run, capsys):
    assert main(["checkpoints", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["3", "6"]
    assert [line.split("  ")[-1] for line in lines[2:]] == ["verified (params, optimizer)"] * 2
    assert float(lines[2].split()[1]) > 0
    for file in (run / "checkpoints/3").rglob("*"):
        os.utime(file, (time.time() - 9000,) * 2)
    assert listing.checkpoint_table(run)[0].splitlines()[2].split()[2:4] == ["2", "h"]

    data = max((run / "checkpoints/6/optimizer").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    assert main(["checkpoints", str(run)]) == 1
    damaged = capsys.readouterr().out.splitlines()
    assert damaged[2].endswith("verified (params, optimizer)")
    assert "DAMAGED: optimizer: " in damaged[3]


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_damaged(run, tmp_path, monkeypatch):
    copy, verify = tmp_path / "run", listing.verify
    shutil.copytree(run, copy)

    def removed(directory, step):
        if step == 3:
            shutil.rmtree(directory / "3")
        return verify(directory, step)

    monkeypatch.setattr(listing, "verify", removed)
    text, _ = listing.checkpoint_table(copy)
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["6"]


def test_difference_of_configs(run, capsys):
    assert main(["checkpoints", str(run), "--diff", "3", "6"]) == 0
    assert capsys.readouterr().out == "train.batch_rows: 8 -> 16\n"
    assert "are the same" in listing.config_difference(run, 3, 3)
    with pytest.raises(UserError, match="no checkpoint of step 4"):
        listing.config_difference(run, 3, 4)
