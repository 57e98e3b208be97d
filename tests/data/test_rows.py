import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.data.rows import ConcatRows, FitRows

DTYPES = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32)
DTYPES["loss_weights"] = np.float32


def random_masks(documents, seed=5):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2, len(ids)).astype(np.uint8) for ids in documents]


def row_of(segments, length):
    """A row written out in plain Python from (ids, targets, weights) of each of its segments."""
    row = {key: [] for key in DTYPES}
    for number, (ids, targets, weights) in enumerate(segments, start=1):
        row["tokens"] += list(ids)
        row["targets"] += list(targets)
        row["loss_weights"] += list(weights)
        row["segment_ids"] += [number] * len(ids)
        row["positions"] += list(range(len(ids)))
    return {key: np.array(values + [0] * (length - len(values)), DTYPES[key]) for key, values in row.items()}


def shifted(ids, mask):
    """Targets and weights of a document: the next token, and none after the last."""
    mask = np.ones(len(ids)) if mask is None else mask
    return [*ids[1:], 0], [*mask[1:], 0]


def concat_reference(documents, masks, length):
    """All rows of the stream, token by token."""
    stream = []  # (document, id, target, weight)
    for number, ids in enumerate(documents):
        targets, weights = shifted(ids, masks and masks[number])
        stream += zip([number] * len(ids), ids, targets, weights, strict=True)
    stream = stream[:-1]
    rows = []
    for start in range(0, len(stream), length):
        piece = stream[start : start + length]
        segments = []
        for number in dict.fromkeys(token[0] for token in piece):
            segments.append(list(zip(*[token[1:] for token in piece if token[0] == number], strict=True)))
        rows.append(row_of(segments, length))
    return rows


def assert_rows(rows, expected, indices):
    batch = rows.read(np.array(indices))
    assert {key: values.dtype for key, values in batch.items()} == DTYPES
    for place, index in enumerate(indices):
        for key, values in expected[index].items():
            np.testing.assert_array_equal(batch[key][place], values, err_msg=f"{key} of row {index}")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("longest", "length"), [(1, 16), (30, 7), (30, 64), (500, 33), (3, 10_000)])
def test_concat_rows(make_store, random_documents, longest, length, masked):
    documents = random_documents(60, longest)
    masks = random_masks(documents) if masked else None
    rows = ConcatRows(make_store(documents, masks), length)
    expected = concat_reference(documents, masks, length)
    assert len(rows) == len(expected)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    assert_rows(rows, expected, order + order[:3])


def test_a_token_of_any_value_is_a_token(make_store):
    # 0 is padding to many, 2 is eos: neither means anything here.
    rows = ConcatRows(make_store([[0, 0, 2, 2, 0], [2, 0, 0]]), 7)
    batch = rows.read(np.array([0]))
    assert batch["tokens"].tolist() == [[0, 0, 2, 2, 0, 2, 0]]
    assert batch["targets"].tolist() == [[0, 2, 2, 0, 0, 0, 0]]
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 1, 0, 1, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]


def test_documents_of_a_concat_row(make_store):
    rows = ConcatRows(make_store([[1] * 5, [1] * 2, [1] * 9, [1]]), 6)
    documents = [rows.documents(index) for index in range(3)]
    assert documents == [["doc-0", "doc-1"], ["doc-1", "doc-2"], ["doc-2"]]


def test_a_store_of_one_token_is_refused(make_store):
    with pytest.raises(UserError, match="single token"):
        ConcatRows(make_store([[1]]), 4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("longest", "length"), [(1, 16), (40, 64), (90, 64), (500, 100)])
def test_fit_rows(make_store, random_documents, longest, length, masked):
    documents = random_documents(80, longest)
    masks = random_masks(documents) if masked else None
    rows = FitRows(make_store(documents, masks), length)
    expected, seen = [], []
    for index in range(len(rows)):
        numbers = [int(name.removeprefix("doc-")) for name in rows.documents(index)]
        seen += numbers
        segments = []
        for number in numbers:
            ids = documents[number][:length]
            segments.append((ids, *shifted(ids, masks and masks[number][:length])))
        expected.append(row_of(segments, length))
    assert sorted(seen) == list(range(80))
    assert rows.truncated == sum(len(ids) > length for ids in documents)
    assert rows.num_tokens == sum(min(len(ids), length) for ids in documents)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    assert_rows(rows, expected, order + order[:2])
