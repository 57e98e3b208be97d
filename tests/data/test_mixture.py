from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.common.errors import UserError
from lemur_jax.data.config import DataConfig, SourceConfig
from lemur_jax.data.mixture import Mixture, open_mixture, open_rows
from lemur_jax.data.rows import ConcatRows, FitRows
from tests.helpers.documents import rewrite_manifest
from tests.helpers.fake_rows import ids_of, source


@settings(max_examples=50, deadline=None)
@given(
    shares=st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any),
    fills=st.lists(st.integers(1, 16), min_size=6, max_size=6),
    batch_rows=st.integers(1, 40),
    first=st.sampled_from([0, 1, 12345, 10**6, 2**40]),
)
def test_shares_are_exact_by_tokens_in_every_window(shares, fills, batch_rows, first):
    sources = [source(f"s{i}", share, fill=fills[i]) for i, share in enumerate(shares)]
    mixture = Mixture(sources, seed=0, batch_rows=batch_rows)
    ids = ids_of(mixture, range(first, first + 20))
    weights = [Fraction(share, fill) for share, fill in zip(shares, fills, strict=False)]
    for index, weight in enumerate(weights):
        wanted = float(weight / sum(weights))
        # Rows so far less the share of them; the error of a window is the difference of two of these.
        ahead = np.cumsum(np.append(0, (ids == index) - wanted))
        assert ahead.max() - ahead.min() <= len(shares) - 1 + 1e-9


@pytest.mark.parametrize("first", [0, 7, 1_000_000, 2**40 // 13, 2**40])
def test_locate_agrees_with_python_integers(first):
    shares = [0.1, 3.3, 7e-5, 1 / 3, 0.0]
    mixture = Mixture([source(f"s{i}", s, rows=97) for i, s in enumerate(shares)], seed=3, batch_rows=13)
    counts = mixture.rows_before(first * 13)
    assert sum(counts) == first * 13
    source_ids, row_indices = mixture.locate(first)
    for place in range(13):
        row = first * 13 + place
        after = mixture.rows_before(row + 1)
        (taken,) = [i for i in range(5) if after[i] != counts[i]]
        assert source_ids[place] == taken
        # The row is that of this visit alone, whatever batch it is in.
        assert row_indices[place] == mixture._visit(taken, counts[taken], 1)[0]
        counts = after
    assert source_ids.dtype == np.int32
    assert row_indices.dtype == np.int64


def test_batches_depend_on_seed_and_step_alone():
    sources = [source("a", 1.0), source("b", 1.0)]
    mixture = Mixture(sources, seed=1, batch_rows=8)
    later = mixture.locate(500)
    mixture.locate(3)
    for array, again in zip(later, Mixture(sources, seed=1, batch_rows=8).locate(500), strict=True):
        np.testing.assert_array_equal(array, again)
    assert (Mixture(sources, seed=2, batch_rows=8).locate(500)[1] != later[1]).any()
    # A source's order is its own: it does not change with what it is mixed with.
    alone = Mixture([sources[1]], seed=1, batch_rows=8).locate(0)[1]
    mixed = np.concatenate([mixture.locate(step)[1][mixture.locate(step)[0] == 1] for step in range(4)])
    np.testing.assert_array_equal(alone, mixed[:8])


def test_two_batch_sizes_see_the_same_rows():
    sources = [source("a", 3.0), source("b", 1.0)]
    small, large = (Mixture(sources, seed=1, batch_rows=rows) for rows in (8, 32))
    for part, whole in zip(zip(*map(small.locate, range(4)), strict=True), large.locate(0), strict=True):
        np.testing.assert_array_equal(np.concatenate(part), whole)


def test_the_order_is_pinned():
    # A resumed run must see what the first one saw. If this fails, old runs can no longer be resumed.
    mixture = Mixture([source("code", 10.0), source("text", 1.0)], seed=42, batch_rows=12)
    source_ids, row_indices = mixture.locate(1_000_000)
    assert source_ids.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert row_indices.tolist() == [782, 647, 268, 842, 805, 127, 880, 174, 939, 970, 909, 404]


def test_read_puts_rows_in_their_places():
    mixture = Mixture([source("a", 1.0), source("b", 1.0)], seed=0, batch_rows=6)
    source_ids, row_indices = mixture.locate(0)
    batch = mixture.read(source_ids, row_indices)
    np.testing.assert_array_equal(batch["tokens"], np.repeat(row_indices[:, None], 16, axis=1))
    assert batch["loss_weights"].dtype == np.float32
    part = mixture.read(source_ids[2:5], row_indices[2:5])
    np.testing.assert_array_equal(part["tokens"], batch["tokens"][2:5])
    names = [
        f"{'ab'[i]}/{kind}{row}" for i, row in zip(source_ids, row_indices, strict=True) for kind in "de"
    ]
    assert mixture.documents(0) == names


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": {"share": -1.0}}, r"data.sources.a.share is -1.0"),
        ({"a": {"share": float("nan")}}, r"data.sources.a.share is nan"),
        ({"a": {"share": 0.0}, "b": {"share": 0.0}}, r"all shares of config.data.sources are 0"),
        ({"a": {"share": 1.0, "max_epochs": -1}}, "max_epochs is -1"),
        ({"a": {"share": 1.0, "packing": "tight"}}, "packing is 'tight': it must be one of 'concat', 'fit'"),
    ],
)
def test_impossible_sources_are_refused(sources, message):
    with pytest.raises(UserError, match=message):
        DataConfig(sources={name: SourceConfig(**options) for name, options in sources.items()})


def test_a_mixture_needs_sources():
    with pytest.raises(UserError, match="data.sources is empty"):
        Mixture([], seed=0, batch_rows=4)


@pytest.fixture
def data(tmp_path):
    text = SourceConfig(share=10.0, packing="concat", max_epochs=1.0)
    chat = SourceConfig(share=1.0, packing="fit")
    return DataConfig(stores=str(tmp_path), sequence_length=32, sources={"text": text, "chat": chat})


def test_open_mixture(data, make_store, random_documents, chat_tokenizer, tmp_path):
    fields = {"tokenizer_digest": chat_tokenizer.digest}
    documents = random_documents(40, 30)
    with pytest.raises(UserError, match=r"chat.train does not exist.*lemur prepare"):
        open_mixture(data, chat_tokenizer, seed=42, batch_rows=8)
    stores = [
        make_store(documents, masks=[ids % 2 for ids in documents], name="chat/train", **fields),
        make_store(documents, name="text/train", **fields),
    ]
    mixture = open_mixture(data, chat_tokenizer, seed=42, batch_rows=8)
    assert [type(source.rows) for source in mixture.sources] == [FitRows, ConcatRows]
    assert [(source.name, source.share, source.max_epochs) for source in mixture.sources] == [
        ("chat", 1.0, 0.0),
        ("text", 10.0, 1.0),
    ]
    assert (mixture.seed, mixture.batch_rows, mixture.length) == (42, 8, 32)
    assert mixture.digests() == {
        name: store.manifest.digest for name, store in zip(("chat", "text"), stores, strict=True)
    }
    assert isinstance(open_rows(data, chat_tokenizer, "chat", "train"), FitRows)
    assert isinstance(open_rows(data, chat_tokenizer, "text", "train"), ConcatRows)
    rewrite_manifest(tmp_path / "text/train", tokenizer_digest="0" * 64)
    with pytest.raises(UserError, match="tokenizer 00000000"):
        open_mixture(data, chat_tokenizer, seed=42, batch_rows=8)
