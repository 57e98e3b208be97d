import json

import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.data import arrays
from lemur_jax.data.manifest import Manifest, read_manifest
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare.store_writer import StoreWriter
from tests.helpers.documents import FIELDS


def test_documents_come_back(make_store, random_documents):
    documents = random_documents(300, 2000)
    store = make_store(documents)
    assert (store.num_documents, store.num_tokens) == (300, sum(map(len, documents)))
    for index in (0, 1, 150, 299):
        ids, mask = store.document(index)
        np.testing.assert_array_equal(ids, documents[index])
        assert mask is None
    assert store.document_ids(np.array([7, 3, 7])) == ["doc-7", "doc-3", "doc-7"]
    np.testing.assert_array_equal(store.offsets(), np.cumsum([0, *map(len, documents)]))


@pytest.mark.parametrize("shard_bytes", [1 << 15, 1 << 25])
def test_any_span_can_be_read(make_store, random_documents, shard_bytes, monkeypatch):
    monkeypatch.setattr(arrays, "_SHARD_BYTES", shard_bytes)
    documents = random_documents(100, 2000)
    store, stream = make_store(documents), np.concatenate(documents)
    assert (len(list((store.path / "tokens/c").iterdir())) > 3) == (shard_bytes == 1 << 15)
    rng = np.random.default_rng(1)
    starts = rng.integers(0, len(stream) - 5000, 50)
    lengths = rng.integers(0, 5000, 50)
    expected = np.concatenate([stream[a : a + n] for a, n in zip(starts, lengths, strict=True)])
    np.testing.assert_array_equal(store.tokens(starts, lengths), expected)


@pytest.mark.parametrize("longest", [1, 3, 100, 20_000])
def test_finding_documents(make_store, random_documents, longest):
    documents = random_documents(15_000 if longest < 100 else 60, longest)
    store = make_store(documents)
    offsets = np.cumsum([0, *map(len, documents)])
    rng = np.random.default_rng(2)
    starts = np.append(rng.integers(0, offsets[-1], 200), [0, 0, offsets[-1] - 1])
    stops = np.minimum(starts + rng.integers(1, 9000, 203), offsets[-1])
    stops[-2:] = offsets[-1]
    spans, found, positions = store.document_starts(starts, stops)
    for span in range(203):
        first = np.searchsorted(offsets, starts[span], "right") - 1
        last = np.searchsorted(offsets, stops[span] - 1, "right") - 1
        np.testing.assert_array_equal(found[spans == span], np.arange(first, last + 1))
        np.testing.assert_array_equal(positions[spans == span], offsets[first : last + 1])
    assert (np.diff(spans) >= 0).all()


def test_loss_mask(make_store):
    store = make_store([[1, 5, 6, 2], [1, 7, 2]], masks=[[1, 0, 1, 1], [0, 1, 0]])
    ids, mask = store.document(0)
    assert (ids.tolist(), mask.tolist()) == ([1, 5, 6, 2], [1, 0, 1, 1])
    assert store.loss_mask(np.array([5, 0]), np.array([2, 1])).tolist() == [1, 0, 1]
    # The first token of a document is nobody's target.
    assert store.manifest.supervised_tokens == 3


def test_a_file_that_is_gone_is_an_error_and_no_zeros(make_store, tmp_path):
    mask = np.zeros(9000, np.uint8)  # two chunks of nothing but zeros: they are stored too
    mask[-1] = 1
    store = make_store([np.arange(9000) % 100], masks=[mask])
    np.testing.assert_array_equal(store.loss_mask(np.array([0]), np.array([9000])), mask)
    (path,) = {file.parents[2] for file in tmp_path.rglob("loss_mask/c/*")}
    (path / "loss_mask" / "c" / "0").unlink()
    again = TokenStore.open(path)
    np.testing.assert_array_equal(again.tokens(np.array([0]), np.array([9000])), np.arange(9000) % 100)
    with pytest.raises(UserError, match=r"cannot be read: .*loss_mask/c/0.* is missing.*; restore the file"):
        again.loss_mask(np.array([0]), np.array([9000]))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_width_of_tokens(make_store, vocab_size, dtype):
    store = make_store([[0, vocab_size - 1]], vocab_size=vocab_size)
    assert store.document(0)[0].dtype == dtype
    assert store.document(0)[0].tolist() == [0, vocab_size - 1]


def test_unicode_ids(tmp_path):
    with StoreWriter(tmp_path / "s", Manifest(**FIELDS)) as writer:
        writer.add([1], id="漢字/😀.py", n_bytes=1)
        writer.add([1], id="", n_bytes=0)
        writer.add(np.array([1]), id="x", n_bytes=0)
    assert TokenStore.open(tmp_path / "s").document_ids(np.arange(3)) == ["漢字/😀.py", "", "x"]


def test_an_exception_leaves_nothing_behind(tmp_path):
    def write(fail):
        with StoreWriter(tmp_path / "s", Manifest(**FIELDS)) as writer:
            writer.add([1, 2, 3 + fail], id="x", n_bytes=1)
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(fail=True)
    assert list(tmp_path.iterdir()) == []
    write(fail=False)
    with pytest.raises(KeyboardInterrupt):
        write(fail=True)
    # What was there before is there still.
    assert TokenStore.open(tmp_path / "s").document(0)[0].tolist() == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    "document",
    [{"ids": []}, {"ids": [-1]}, {"ids": [1000]}, {"ids": [1], "mask": [1]}],
    ids=["empty", "negative", "above", "mask"],
)
def test_impossible_documents_are_refused(tmp_path, document):
    with (
        pytest.raises(ValueError, match="document 'x'"),
        StoreWriter(tmp_path / "s", Manifest(**FIELDS)) as writer,
    ):
        writer.add(**document, id="x", n_bytes=1)


def test_missing_damaged_empty_and_foreign_stores(make_store, tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*lemur prepare"):
        TokenStore.open(tmp_path / "nowhere")
    with StoreWriter(tmp_path / "empty", Manifest(**FIELDS)):
        pass
    assert read_manifest(tmp_path / "empty").documents == 0
    with pytest.raises(UserError, match="is empty: the task t has no documents in its split train"):
        TokenStore.open(tmp_path / "empty")
    make_store([[1, 2]])
    file = tmp_path / "a/train/manifest.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"format_version": 99, "new_field": 1}))
    with pytest.raises(UserError, match="format version 99, this program reads 2"):
        TokenStore.open(tmp_path / "a/train")
    for damaged in (whole[:40], "[]", "{}", whole.replace('"documents"', '"dokuments"')):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"manifest.json is damaged .*: make it again"):
            TokenStore.open(tmp_path / "a/train")
    file.write_text(whole)
    (tmp_path / "a/train/offsets/zarr.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        TokenStore.open(tmp_path / "a/train")


def test_the_tokenizer_must_be_the_stores(make_store, tmp_path, tokenizer, chat_tokenizer):
    path = tmp_path / "a/train"
    make_store([[1, 2]], tokenizer_digest=tokenizer.digest)
    for reader in (tokenizer, chat_tokenizer, None):
        assert TokenStore.open(path, reader).num_tokens == 2
    make_store([[1, 2]], tokenizer_digest=tokenizer.digest, added_tokens=chat_tokenizer.added_tokens)
    assert TokenStore.open(path, chat_tokenizer).num_tokens == 2
    with pytest.raises(UserError, match=r"control token <pad> has id 700; .* without that"):
        TokenStore.open(path, tokenizer)
    make_store([[1, 2]], tokenizer_digest=tokenizer.digest, added_tokens={"<pad>": 7})
    with pytest.raises(UserError, match=r"control token <pad> has id 7; .* without that"):
        TokenStore.open(path, chat_tokenizer)
    make_store([[1, 2]])
    with pytest.raises(
        UserError, match=f"tokenizer ffffffff; the one given is {tokenizer.digest[:8]}: point"
    ):
        TokenStore.open(path, tokenizer)
