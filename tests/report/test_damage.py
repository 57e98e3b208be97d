"""Damaged metrics and configs: no traceback, no hang, and no undamaged record is lost."""

import json
import random
import re

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.report import write_report
from lemur_jax.report.runs import read_runs

VALUES = [
    "x",
    [],
    {},
    [1, "a"],
    {"a": {"b": 1}},
    None,
    True,
    -1,
    0,
    1.5,
    -0.0,
    10**400,
    2**60,
    1e308,
    "\ud800",
]
RAW = [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 20_000, b'"\xff"', b"\x00", b"1" + b"0" * 300]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data)), rng.choice([1, 5, 200])
    noise = bytes(rng.randrange(256) for _ in range(size))
    return rng.choice(
        [
            data[:at],
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
            data[:at] + noise + data[at:],
            data[:at] + data[at + size :],
            data[:at] + rng.choice(RAW) + data[at + 1 :],
        ]
    )


def damage_value(tree: dict, rng: random.Random) -> None:
    """Another value, or none, for a random key at a random depth."""
    key = rng.choice(list(tree))
    if isinstance(tree[key], dict) and tree[key] and rng.random() < 0.8:
        damage_value(tree[key], rng)
    elif rng.random() < 0.2:
        del tree[key]
    else:
        tree[key] = rng.choice(VALUES)


def damaged(data: bytes, rng: random.Random, lines: bool) -> bytes:
    parts = data.splitlines() if lines else [data]
    at = rng.randrange(len(parts))
    try:
        tree = json.loads(parts[at].decode())
    except ValueError:  # damaged before
        tree = None
    if not isinstance(tree, dict) or not tree or rng.random() < 0.5:
        return damage_bytes(data, rng)
    damage_value(tree, rng)
    parts[at] = json.dumps(tree).encode()
    return b"\n".join(parts) + b"\n"


@pytest.mark.slow
def test_500_damaged_workdirs(write_stage, tmp_path):
    workdir = write_stage(tmp_path / "run", {"python_docs": 2.0, "chat": 1.0}, steps=30)
    start = {"step": 0, "kind": "start", "unix_seconds": 1e9, "commit": "a", "versions": ["jax 1"]}
    metrics, config = workdir / "metrics.jsonl", workdir / "config.json"
    whole, options = json.dumps(start).encode() + b"\n" + metrics.read_bytes(), config.read_bytes()
    rng = random.Random(0)
    written = 0
    for _ in range(500):
        data, hurt = whole, options
        for _ in range(rng.choice([1, 1, 1, 3])):
            data = damaged(data, rng, lines=True) if data and rng.random() < 0.7 else data
        hurt = damaged(hurt, rng, lines=False) if data == whole or rng.random() < 0.2 else hurt
        metrics.write_bytes(data)
        config.write_bytes(hurt)
        try:
            page = write_report([workdir], tmp_path / "report.html").read_text(encoding="utf-8")
            (run,) = read_runs([workdir])
        except UserError:
            continue
        written += 1
        for figure in re.findall(r'<script type="application/json">(.*?)</script>', page):
            json.loads(figure, parse_constant=lambda name: pytest.fail(name))
        losses = {record["step"]: record.get("loss") for record in run.train}
        intact = [json.loads(line) for line in set(whole.splitlines()) & set(data.splitlines())]
        intact = [record for record in intact if record["kind"] == "train"]
        repeated = len(re.findall(rb'"kind": "train"', data)) > 30
        assert repeated or all(losses[record["step"]] is not None for record in intact)
    assert written > 300
