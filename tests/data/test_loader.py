import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.data.loader import BATCH_KEYS, Loader, chosen_rows, held_out_batches
from lemur_jax.data.mixture import Mixture, Source
from lemur_jax.data.rows import ConcatRows, FitRows

LENGTH = 24


BOTH = PartitionSpec("rows", "columns")


def sharding_of(rows, columns, spec=BOTH):
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    return NamedSharding(Mesh(devices, ("rows", "columns")), spec)


@pytest.fixture
def mixture(make_store, random_documents):
    documents = random_documents(200, 40)
    masks = [np.arange(len(ids)) % 3 == 1 for ids in documents]
    sources = [
        Source(name="text", rows=ConcatRows(make_store(documents), LENGTH), share=2.0),
        Source(name="chat", rows=FitRows(make_store(documents, masks, name="b/train"), LENGTH), share=1.0),
    ]
    return Mixture(sources, seed=7, batch_rows=16)


def assert_batches_equal(batch, expected):
    assert set(batch) == {*BATCH_KEYS, "source_ids"} == set(expected)
    for key in expected:
        np.testing.assert_array_equal(np.asarray(batch[key]), np.asarray(expected[key]), err_msg=key)


def expected_batch(mixture, step):
    source_ids, row_indices = mixture.locate(step)
    return mixture.read(source_ids, row_indices) | {"source_ids": source_ids}


@pytest.mark.parametrize(
    "sharding",
    [
        lambda: sharding_of(1, 1),
        lambda: sharding_of(8, 1),
        lambda: sharding_of(2, 4),
        lambda: sharding_of(1, 8),
        lambda: sharding_of(4, 2, PartitionSpec("rows")),
        lambda: sharding_of(4, 2, PartitionSpec(("rows", "columns"), None)),
        lambda: sharding_of(4, 2, PartitionSpec()),
    ],
)
def test_a_batch_is_the_same_on_every_mesh(mixture, sharding):
    loader = Loader(mixture, sharding())
    for step in (0, 1_000_000):
        batch = loader.batch(step)
        assert_batches_equal(batch, expected_batch(mixture, step))
        for key in BATCH_KEYS:
            assert batch[key].sharding == sharding()
            assert batch[key].dtype == (np.float32 if key == "loss_weights" else np.int32)
        assert batch["source_ids"].dtype == np.int32


def test_iterate_gives_each_step_in_order(mixture):
    loader = Loader(mixture, sharding_of(8, 1))
    batches = dict(loader.iterate(5, 12))
    assert list(batches) == list(range(5, 12))
    for step, batch in batches.items():
        assert_batches_equal(batch, loader.batch(step))
    assert list(loader.iterate(5, 5)) == []


def read_ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_iterate_reads_three_batches_ahead_and_stops_with_its_reader(mixture, monkeypatch):
    loader = Loader(mixture, sharding_of(1, 1))
    read = []
    batch = loader.batch
    monkeypatch.setattr(loader, "batch", lambda step: read.append(step) or batch(step))
    steps = loader.iterate(0, 1000)
    next(steps)
    next(steps)
    assert read_ahead_threads()
    steps.close()
    assert not read_ahead_threads()
    assert read == list(range(len(read)))
    assert 2 <= len(read) <= 5  # two taken and three ahead


@pytest.mark.parametrize(
    ("rows", "max_rows"), [(1, 0), (15, 0), (16, 0), (17, 0), (40, 0), (40, 17), (40, 99)]
)
def test_held_out_batches_hold_every_row_once(make_store, rows, max_rows):
    documents = [np.arange(1, LENGTH + 1)] * rows
    held_out = FitRows(make_store(documents), LENGTH)
    batches = list(held_out_batches(held_out, 16, sharding_of(8, 1), max_rows))
    count = min(rows, max_rows or rows)
    assert len(batches) == -(-count // 16)
    joined = {key: np.concatenate([np.asarray(batch[key]) for batch in batches]) for key in batches[0]}
    expected = held_out.read(chosen_rows(rows, max_rows))
    for key in BATCH_KEYS:
        np.testing.assert_array_equal(joined[key][:count], expected[key])
        assert not joined[key][count:].any()
    assert joined["source_ids"].shape == (len(batches) * 16,)
    assert not joined["source_ids"].any()


def test_the_rows_that_are_scored_are_spread_over_the_store_and_always_the_same():
    chosen = chosen_rows(10_000, 400)
    assert len(set(chosen.tolist())) == 400
    assert 4_500 < chosen.mean() < 5_500
    assert chosen.tolist() == chosen_rows(10_000, 400).tolist()
    assert chosen_rows(5, 0).tolist() == chosen_rows(5, 9).tolist() == [0, 1, 2, 3, 4]


def test_a_host_reads_its_own_rows_alone(mixture, monkeypatch):
    """Also where groups of four rows go to the first host, the second, the first, the second."""
    devices = np.array(jax.devices())[[0, 1, 4, 5, 2, 3, 6, 7]].reshape(4, 2)
    sharding = NamedSharding(Mesh(devices, ("rows", "columns")), BOTH)
    whole = expected_batch(mixture, 3)
    of_all = NamedSharding.addressable_devices_indices_map
    blocks = []

    def take(shape, sharding, block):
        places = sharding.addressable_devices_indices_map(shape).values()
        blocks.extend((place, block(place)) for place in places if len(place) == 2)

    monkeypatch.setattr(jax, "make_array_from_callback", take)
    monkeypatch.setattr(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {device: place for device, place in of_all(self, shape).items() if device.id < 4},
    )
    loader = Loader(mixture, sharding)
    own = np.arange(16) // 4 % 2 == 0
    read = []
    monkeypatch.setattr(mixture, "read", lambda *rows: read.append(rows) or Mixture.read(mixture, *rows))
    loader.batch(3)
    assert [len(rows) for rows in read[0]] == [own.sum()] * 2
    tokens = np.full((16, LENGTH), -1)
    for place, values in blocks[:4]:  # of `tokens`, the first key
        tokens[place] = values
    np.testing.assert_array_equal(tokens, np.where(own[:, None], whole["tokens"], -1))
