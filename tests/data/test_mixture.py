import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lemur_jax.common.errors import UserError
from lemur_jax.common.sections import from_plain
from lemur_jax.config import default_config, from_config_dict
from lemur_jax.data.config import DataConfig, SourceConfig, SourceCounts, StageConfig, read_record
from lemur_jax.data.mixture import Mixture, open_mixture, open_rows
from lemur_jax.data.rows import ConcatRows, FitRows
from lemur_jax.models.presets import preset
from tests.helpers.documents import rewrite_manifest
from tests.helpers.fake_rows import ids_of, source


def stages(*pairs):
    return [(f"stage{step}", StageConfig(step=step, shares=shares)) for step, shares in pairs]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 6),
    shares=st.lists(st.lists(st.integers(0, 1000), min_size=6, max_size=6), min_size=1, max_size=4),
    fills=st.lists(st.integers(1, 16), min_size=6, max_size=6),
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    batch_rows=st.integers(1, 40),
    far=st.sampled_from([0, 1, 12345, 10**6, 2**40]),
)
def test_shares_are_exact_by_tokens_in_every_window(count, shares, fills, lengths, batch_rows, far):
    shares = [each[:count] for each in shares]
    assume(all(map(any, shares)))
    named = [{f"s{i}": share for i, share in enumerate(each)} for each in shares]
    sources = [source(name, share, fill=fills[i]) for i, (name, share) in enumerate(named[0].items())]
    begins = np.cumsum([0, *lengths])[: len(shares)].tolist()
    # In any order: they are sorted by step.
    later = stages(*zip(begins[1:], named[1:], strict=True))[::-1]
    mixture = Mixture(sources, seed=0, batch_rows=batch_rows, stages=later)
    windows = [range(*pair) for pair in itertools.pairwise(begins)]
    windows.append(range(begins[-1] + far, begins[-1] + far + 20))  # far into the last stage
    for wanted, window in zip(shares, windows, strict=True):
        ids = ids_of(mixture, window)
        weights = [Fraction(share, fill) for share, fill in zip(wanted, fills, strict=False)]
        for index, weight in enumerate(weights):
            # Rows so far less the share of them; the error of a window is the difference of two of these.
            ahead = np.cumsum(np.append(0, (ids == index) - float(weight / sum(weights))))
            assert ahead.max() - ahead.min() <= count - 1 + 1e-9
            assert weight or not (ids == index).any()


@pytest.mark.parametrize("later", [[], stages((1_000_000, {"s0": 1 / 3, "s2": 1.0}))], ids=["one", "two"])
@pytest.mark.parametrize("first", [0, 7, 999_999, 1_000_000, 2**40 // 13, 2**40])
def test_locate_agrees_with_python_integers(first, later):
    sources = [source(f"s{i}", s, rows=97) for i, s in enumerate([0.1, 3.3, 7e-5, 1 / 3, 0.0])]
    mixture = Mixture(sources, seed=3, batch_rows=13, stages=later)
    counts = mixture.rows_before(first * 13)
    assert sum(counts) == first * 13
    source_ids, row_indices = mixture.locate(first)
    for place in range(13):
        row = first * 13 + place
        after = mixture.rows_before(row + 1)
        (taken,) = [i for i in range(5) if after[i] != counts[i]]
        assert source_ids[place] == taken
        # The row is that of this visit alone, whatever batch it is in.
        assert row_indices[place] == mixture.visits(taken, counts[taken], 1)[0]
        counts = after
    assert source_ids.dtype == np.int32
    assert row_indices.dtype == np.int64


def test_a_source_goes_through_its_rows_in_one_order_over_all_stages():
    sizes = {"a": 50, "b": 31, "late": 17}
    sources = [
        source(name, share, rows=sizes[name]) for name, share in (("a", 2.0), ("b", 1.0), ("late", 0.0))
    ]
    later = stages(
        (9, {"b": 1.0, "late": 1.0}), (20, {"late": 3.0, "a": 1.0}), (41, {"a": 1.0, "b": 1.0, "late": 1.0})
    )
    mixture = Mixture(sources, seed=9, batch_rows=9, stages=later)
    ids, rows = map(np.concatenate, zip(*map(mixture.locate, range(100)), strict=True))
    for index, each in enumerate(sources):
        visits = rows[ids == index]
        alone = Mixture([source(each.name, 1.0, rows=sizes[each.name])], seed=9, batch_rows=1)
        np.testing.assert_array_equal(visits, [alone.locate(step)[1][0] for step in range(len(visits))])
        epochs = visits[: len(visits) // len(each.rows) * len(each.rows)].reshape(-1, len(each.rows))
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 3  # each in an order of its own
        assert (np.sort(epochs) == np.arange(len(each.rows))).all()  # no row twice in an epoch, none left out


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
        ({"a": {"share": -2.0}}, r"data.sources.a.share is -2.0"),
        ({"a": {"share": float("nan")}}, r"data.sources.a.share is nan"),
        ({"a": {"share": 0.0}, "b": {"share": 0.0}}, r"all shares of config.data.sources are 0"),
        ({"a": {"share": 1.0, "max_epochs": -1}}, "max_epochs is -1"),
        ({"a": {"share": 1.0}, "b": {"packing": "fit"}}, r"data\.sources\.b has no share"),
        ({"a": {"share": 1.0, "packing": "tight"}}, "packing is 'tight': it must be one of 'concat', 'fit'"),
    ],
)
def test_impossible_sources_are_refused(sources, message):
    with pytest.raises(UserError, match=message):
        DataConfig(sources={name: SourceConfig(**options) for name, options in sources.items()})


def config_with(**later):
    config = default_config(preset("tiny"))
    config.data.sources = {
        name: {"share": 1.0, "packing": "concat", "max_epochs": 0.0} for name in ("code", "text")
    }
    config.data.stages = later
    return from_config_dict(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 900, "shares": {"cod": 1.0}}, r"anneal\.shares is 'cod': .*did you mean 'code'"),
        ({"step": 0, "shares": {"code": 1.0}}, r"anneal\.step is 0: .* below train\.steps \(1000\)"),
        ({"step": 1000, "shares": {"code": 1.0}}, r"anneal\.step is 1000"),
        ({"step": 1.5, "shares": {"code": 1.0}}, r"anneal\.step is 1\.5: it must be a whole number"),
        ({"shares": {"code": 1.0}}, r"data\.stages\.anneal\.step is missing"),
        ({"step": 900, "shares": {"code": 0.0}}, r"all shares of config\.data\.stages\.anneal\.shares are 0"),
        ({"step": 900, "shares": {"code": -1.0}}, r"anneal\.shares\.code is -1\.0"),
        ({"step": 900, "shares": {"code": "much"}}, r"anneal\.shares\.code is 'much'"),
        ({"step": 900, "share": {"code": 1.0}}, r"data\.stages\.anneal\.share; did you mean 'shares'"),
        (900, r"data\.stages\.anneal is 900: it must be a section with step, shares"),
    ],
)
def test_a_bad_stage_is_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        config_with(anneal=options)
    assert "\n" not in str(error.value)


def test_two_stages_cannot_begin_together():
    with pytest.raises(
        UserError, match=r"data\.stages is {'a': 5, 'b': 5}: it must be stages that begin at diff"
    ):
        config_with(**{name: {"step": 5, "shares": {"code": 1.0}} for name in "ab"})


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


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b'{"code": 3}', b'{"code": {"rows": 1}}'])
def test_a_damaged_record_of_prepare_is_one_line(tmp_path, content):
    assert read_record(tmp_path / "none.json", SourceCounts) == {}
    (tmp_path / "counts-8.json").write_bytes(content)
    with pytest.raises(UserError, match=r"counts-8\.json is damaged .*: remove it and run `lemur prepare`"):
        read_record(tmp_path / "counts-8.json", SourceCounts)


def test_a_home_directory_is_no_directory_of_that_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = from_plain(DataConfig, {"stores": "~/stores"})
    assert config.stores == "/home/me/stores"
    assert from_plain(DataConfig, {"stores": "gs://bucket/~stores"}).stores == "gs://bucket/~stores"
