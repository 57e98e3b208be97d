"""Packing: best fit decreasing as the textbook has it, and its files beside the store."""

import itertools
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.common.errors import UserError
from lemur_jax.data import packing
from lemur_jax.data.manifest import REJECTED
from lemur_jax.data.mixture import Source
from lemur_jax.data.packing import open_packing, pack
from lemur_jax.data.rows import FitRows
from lemur_jax.data.store import TokenStore
from lemur_jax.train.inputs import check_preferences


def best_fit_decreasing(lengths, capacity):
    """The textbook's: each into the fullest bin that has room."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in room if space >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_is_best_fit_decreasing(lengths):
    documents, row_offsets = pack(np.array(lengths), 20)
    rows = [documents[a:b] for a, b in itertools.pairwise(row_offsets)]
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    assert all((np.diff(row) > 0).all() for row in rows)
    room = sorted(20 - sum(lengths[index] for index in row) for row in rows)
    assert room == best_fit_decreasing(lengths, 20)


@pytest.fixture
def store(make_store):
    """1,000 documents of 1 to 60 tokens; some are longer than the rows of 48 below."""
    lengths = np.random.default_rng(4).integers(1, 61, 1000)
    return make_store([[1] * length for length in lengths]), lengths


@pytest.mark.parametrize("together", [1 << 18, 300, 1])
def test_every_document_is_in_one_row_whatever_is_packed_together(store, monkeypatch, together):
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", together)
    monkeypatch.setattr("lemur_jax.data.arrays._MAPPED", 64)
    store, lengths = store
    packed = open_packing(store, 48)
    documents = [packed.documents(row) for row in range(packed.counts.rows)]
    assert sorted(np.concatenate(documents).tolist()) == list(range(1000))
    assert packed.counts.truncated == np.count_nonzero(lengths > 48)
    assert packed.counts.tokens == np.minimum(lengths, 48).sum()
    counts, starts, kept = packed.spans(np.array([3, 0, packed.counts.rows - 1]))
    wanted = [documents[row] for row in (3, 0, packed.counts.rows - 1)]
    assert counts.tolist() == list(map(len, wanted))
    np.testing.assert_array_equal(starts, (np.cumsum(lengths) - lengths)[np.concatenate(wanted)])
    np.testing.assert_array_equal(kept, np.minimum(lengths, 48)[np.concatenate(wanted)])
    assert all(np.minimum(lengths, 48)[row].sum() <= 48 for row in documents)


def test_documents_of_one_row_are_from_all_over_the_store(make_store, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 100)
    lengths = np.random.default_rng(5).integers(4, 13, 2000)
    packed = open_packing(make_store([[1] * length for length in lengths]), 64)
    spread = [np.ptp(packed.documents(row)) for row in range(packed.counts.rows)]
    assert np.median(spread) > 1000


def test_two_processes_at_once_leave_one_packing(store, monkeypatch):
    store, _ = store
    write = packing._write

    def slow(*arguments):
        monkeypatch.setattr(packing, "_write", write)
        open_packing(store, 48)  # the other process
        return write(*arguments)

    monkeypatch.setattr(packing, "_write", slow)
    assert open_packing(store, 48).counts.rows == open_packing(store, 48).counts.rows
    assert sorted(path.name for path in store.path.iterdir() if "packed" in path.name) == ["packed-48"]


def test_a_packing_beside_another_store_is_refused(make_store):
    """As left by a copy of a new store over an old one."""
    old, new = (make_store([[1] * 9] * count, name=f"{count}/train") for count in (7, 8))
    open_packing(old, 48)
    shutil.copytree(new.path, old.path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"packed-48 was made from another store"):
        open_packing(TokenStore.open(old.path), 48)


def test_a_store_that_cannot_be_written_is_packed_elsewhere(store, monkeypatch):
    store, lengths = store

    def refuse(path, *_, **__):
        raise PermissionError(f"read-only: {path}")

    with monkeypatch.context() as patch:
        patch.setattr(type(store.path), "mkdir", refuse)
        packed = open_packing(store, 48)
    assert packed.counts.tokens == np.minimum(lengths, 48).sum()
    assert packed.documents(0).size
    assert not (store.path / "packed-48").exists()


def test_memory_does_not_grow_with_the_corpus(make_store, monkeypatch):
    for name, value in {"GROUP_DOCUMENTS": 1000, "_COPIED": 1000, "_SHARD_BYTES": 1 << 15}.items():
        monkeypatch.setattr(packing, name, value)
    monkeypatch.setattr("lemur_jax.data.arrays._MAPPED", 1000)
    lengths = np.random.default_rng(6).integers(1, 9, 40_000)
    peaks = []
    for count in (1000, 5000, 40_000):
        store = make_store([[1] * length for length in lengths[:count]], name=f"a/{count}")
        tracemalloc.start()
        packed = open_packing(store, 48)
        packed.spans(np.arange(64) % packed.counts.rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 2 * peaks[1]  # of a corpus eight times as large


def test_documents_whose_targets_lie_beyond_the_row_are_counted(make_store, caplog):
    documents = [[1] * 100, [1] * 100, [1] * 20]
    masks = [[0] * 49 + [1] * 51, [0] * 48 + [1] * 52, [1] * 20]
    store = make_store(documents, masks=masks)
    rows = FitRows(store, 49)
    assert (rows.truncated, rows.without_targets) == (2, 1)
    assert "1 of 3 documents have no supervised token in their first 49, so nothing is trained" in caplog.text
    assert sum(rows.read(np.arange(len(rows)))["loss_weights"].sum(axis=1) > 0) == len(rows) - 1
    assert FitRows(store, 50).without_targets == 0
    with pytest.raises(
        UserError, match="2 of 2 documents have no supervised token in their first 48.*sequence_length"
    ):
        FitRows(make_store(documents[:2], masks=masks[:2], name="b/train"), 48)


def test_pairs_that_are_cut_before_an_answer_are_counted(make_store, caplog):
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(200):
        chosen, rejected = ([0] * rng.integers(1, 9) + [1] * rng.integers(1, 9) for _ in range(2))
        rejected[0] = REJECTED
        masks.append([chosen + rejected, chosen + rejected, chosen, rejected][rng.integers(4)])
    store = make_store([[5] * len(mask) for mask in masks], masks, preferences=True)
    for length in (3, 7, 13, 40):
        lacking = 0
        for mask in masks:
            begin = mask.index(REJECTED) if REJECTED in mask else len(mask)
            sides = [side for side in (range(begin), range(begin, len(mask))) if side]
            lacking += any(all(mask[n] != 1 for n in side if n < length) for side in sides)
        assert FitRows(store, length).without_targets == lacking
    assert "of 200 documents have an answer without a token in their first 13" in caplog.text
    assert "first 40" not in caplog.text
    pairs = make_store(
        [[5] * 12], [[0, 0, 1, 1, 1, 1, REJECTED, 0, 0, 0, 1, 1]], name="b/train", preferences=True
    )
    source = Source(name="b", rows=FitRows(pairs, 9), share=1.0)
    assert "1 of 1 documents have an answer without a token in their first 9" in caplog.text
    check_preferences("kto", [source])  # trains on the chosen answer
    with pytest.raises(UserError, match="only pairs with an answer beyond data.sequence_length"):
        check_preferences("dpo", [source])
    labelled = make_store([[5] * 3] * 1500, [[0, 1, 1]] * 1500, name="c/train", preferences=True)
    assert not labelled.has_pairs()
    mixed = make_store(
        [[5] * 3] * 1500 + [[5] * 6], [[0, 1, 1]] * 1500 + [[0, 1, 1, REJECTED, 1, 1]], name="d/train",
        preferences=True,
    )  # fmt: skip
    assert mixed.has_pairs()
