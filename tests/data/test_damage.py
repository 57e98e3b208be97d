"""Every byte of a token store is covered by a checksum: damage is refused, never read as other tokens."""

import re

import numpy as np
import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.data import arrays, packing
from lemur_jax.data.manifest import Manifest
from lemur_jax.data.rows import FitRows
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare.store_writer import StoreWriter

LENGTH = 64


def content(path) -> list:
    """Everything that can be read of a store, and its packing."""
    store = TokenStore.open(path)
    every = np.array([0]), np.array([store.num_tokens])
    documents = np.arange(store.num_documents)
    starts, owners, positions = store.document_starts(np.array([0]), np.array([store.num_tokens]))
    rows = FitRows(store, LENGTH)
    batch = rows.read(np.arange(len(rows)))
    read = [store.tokens(*every), store.loss_mask(*every), store.offsets(), starts, owners, positions]
    named = [store.document_ids(documents), store.labels_of(documents), [*rows.documents(0)]]
    return [values.tolist() for values in [*read, *batch.values()]] + [*named, store.manifest]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A store with each kind of array, several chunks and shards, and its packing; its path and content."""
    monkeypatch.setattr(arrays, "_SHARD_BYTES", 1 << 15)
    monkeypatch.setattr(packing, "_SHARD_BYTES", 1 << 15)
    rng = np.random.default_rng(0)
    names = {"task": "t", "split": "train", "source": "s", "label_field": "lang", "has_loss_mask": True}
    tokenizer = {"tokenizer_digest": "f" * 64, "added_tokens": {"<a>": 9}, "vocab_size": 1000}
    path = tmp_path / "s"
    with StoreWriter(path, Manifest(**names, **tokenizer)) as writer:
        for index in range(300):
            ids = rng.zipf(1.3, rng.integers(2, 120)) % 1000
            writer.add(ids, f"doc-{index}", len(ids), rng.integers(0, 2, len(ids)), label=f"l{index % 3}")
    return path, content(path)


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """A flipped bit, or one time in ten the file cut short or emptied."""
    place = int(rng.integers(8 * len(data)))
    kind = int(rng.integers(20))
    if kind < 2:
        return data[: place // 8] if kind else b""
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damage_is_silent(written, cases, monkeypatch):
    path, whole = written
    monkeypatch.setattr(arrays, "_context", lambda: None)  # nothing is kept from one case to the next
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {"manifest.json", "packing.json", "zarr.json"} <= {file.name for file in files}
    rng = np.random.default_rng(1)
    refused = 0
    for case in range(cases):
        file = files[case % len(files)]
        data = file.read_bytes()
        file.write_bytes(damage(rng, data))
        try:
            # Whitespace and the like in JSON changes nothing.
            assert content(path) == whole, f"{file} with damage {case} is read as something else"
        except UserError:
            refused += 1
        file.write_bytes(data)
    assert refused > 0.9 * cases
    assert content(path) == whole


def test_inspect_finds_damage_anywhere_in_a_store(written, capsys):
    path, _ = written
    for file in path.rglob("c/*"):
        if "packed" in str(file):
            continue
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        file.write_bytes(data)
        assert main(["inspect", str(path)]) == 2
        assert re.fullmatch(r"lemur inspect: .*cannot be read: .*\n", capsys.readouterr().err)
        data[len(data) // 2] ^= 16
        file.write_bytes(data)
    assert not main(["inspect", str(path)])


def test_ids_at_or_above_the_vocabulary_are_refused(make_store):
    store = make_store([[1, 2, 999]])
    store.manifest.__dict__["vocab_size"] = 999
    with pytest.raises(UserError, match="has the id 999, its vocabulary 999 tokens"):
        store.tokens(np.array([0]), np.array([3]))
