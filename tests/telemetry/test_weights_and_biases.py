"""The real package, offline: what its own reader finds in the file that a run leaves."""

import builtins
import json
import struct

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.telemetry.metrics import MetricsWriter


def log_records(data):
    """The records of a LevelDB log, after W&B's seven bytes: blocks of 32 KiB, a record in one piece or more."""
    at, pieces = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        pieces += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


def test_offline_run_holds_every_number(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "my-run"
    with MetricsWriter(workdir, wandb=True) as writer:
        writer.truncate_after(0)
        writer.write({"step": 3, "kind": "train", "loss": 2.5, "loss/code": 1.25, "grad_norm": float("nan")})
        writer.write({"step": 3, "kind": "eval", "task": "docs", "bits_per_byte": 0.5})
        writer.write({"step": 4, "kind": "skip", "grad_norm": 9.0, "documents": ["code/a"]})
    wandb.teardown()  # ends W&B's own process, which writes the file
    (file,) = (workdir / "wandb").glob("offline-run-*/*.wandb")
    rows, names = [], []
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        names += [record.run.display_name] if record.HasField("run") else []
        if record.HasField("history"):
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    assert names[0] == "my-run"
    assert rows == [
        {"step": 3, "train/loss": 2.5, "train/loss/code": 1.25},
        {"step": 3, "eval/docs/bits_per_byte": 0.5},
        {"step": 4, "skip/grad_norm": 9.0},
    ]


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def blocked(name, *arguments, **options):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with MetricsWriter(tmp_path, wandb=True) as writer, pytest.raises(UserError, match=r"lemur_jax\[wandb\]"):
        writer.truncate_after(0)
