"""Staged mixtures: other shares from a step on, against rows counted one by one."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.common.errors import UserError
from lemur_jax.config import default_config, from_config_dict
from lemur_jax.data.config import StageConfig
from lemur_jax.data.mixture import Mixture, Stage
from lemur_jax.models.presets import preset
from tests.helpers.fake_rows import ids_of, source


def stages(*pairs):
    return [Stage(name=f"stage{step}", step=step, shares=shares) for step, shares in pairs]


def visits_of(mixture, steps):
    """(source ids, row indices) of the rows of updates [0, steps), one after the other."""
    return map(np.concatenate, zip(*map(mixture.locate, range(steps)), strict=True))


@settings(max_examples=30, deadline=None)
@given(
    shares=st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), min_size=2, max_size=4),
    fills=st.lists(st.integers(1, 16), min_size=4, max_size=4),
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    batch_rows=st.integers(1, 20),
)
def test_shares_are_exact_by_tokens_in_every_window_of_a_stage(shares, fills, lengths, batch_rows):
    begins = np.cumsum([0, *lengths])
    named = [{f"s{i}": share for i, share in enumerate(each)} for each in shares]
    sources = [source(f"s{i}", share, fill=fills[i]) for i, share in enumerate(shares[0])]
    later = stages(*((int(begins[n]), named[n]) for n in range(1, len(shares))))
    # In any order: they are sorted by step.
    mixture = Mixture(sources, seed=0, batch_rows=batch_rows, stages=later[::-1])
    for number, wanted in enumerate(shares):
        ids = ids_of(mixture, range(begins[number], begins[number + 1]))
        weights = [Fraction(share, fill) for share, fill in zip(wanted, fills, strict=True)]
        for index, weight in enumerate(weights):
            ahead = np.cumsum(np.append(0, (ids == index) - float(weight / sum(weights))))
            assert ahead.max() - ahead.min() <= 3 + 1e-9
            assert weight or not (ids == index).any()


def test_two_sources_are_exact_to_the_row_at_every_step():
    later = stages((7, {"code": 1.0, "text": 1.0}), (30, {"text": 4.0, "code": 1.0}))
    mixture = Mixture([source("code", 10.0), source("text", 1.0)], seed=1, batch_rows=11, stages=later)
    ids = ids_of(mixture, range(50))
    # One row after the other takes what its stage still owes to text, rounded.
    expected = []
    for steps, part in ((7, Fraction(1, 11)), (23, Fraction(1, 2)), (20, Fraction(4, 5))):
        given_to_code = 0
        for rows in range(1, steps * 11 + 1):
            is_code = given_to_code + Fraction(1, 2) <= rows * (1 - part)
            given_to_code += is_code
            expected.append(0 if is_code else 1)
    assert ids.tolist() == expected


def test_a_source_goes_through_its_rows_in_one_order_over_all_stages():
    sizes = {"a": 50, "b": 31, "late": 17}
    sources = [
        source(name, share, rows=sizes[name]) for name, share in (("a", 2.0), ("b", 1.0), ("late", 0.0))
    ]
    later = stages(
        (9, {"b": 1.0, "late": 1.0}), (20, {"late": 3.0, "a": 1.0}), (41, {"a": 1.0, "b": 1.0, "late": 1.0})
    )
    mixture = Mixture(sources, seed=9, batch_rows=9, stages=later)
    ids, rows = visits_of(mixture, 100)
    for index, each in enumerate(sources):
        visits = rows[ids == index]
        alone = Mixture([source(each.name, 1.0, rows=sizes[each.name])], seed=9, batch_rows=1)
        np.testing.assert_array_equal(visits, [alone.locate(step)[1][0] for step in range(len(visits))])
        epochs = visits[: len(visits) // len(each.rows) * len(each.rows)].reshape(-1, len(each.rows))
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 3  # each in an order of its own
        assert (np.sort(epochs) == np.arange(len(each.rows))).all()  # no row twice in an epoch, none left out


def test_what_comes_before_a_stage_does_not_change_with_it():
    sources = [source("a", 1.0), source("b", 1.0)]
    plain = Mixture(sources, seed=1, batch_rows=8)
    staged = Mixture(sources, seed=1, batch_rows=8, stages=stages((500, {"b": 1.0})))
    for step in (0, 1, 499):
        np.testing.assert_array_equal(plain.locate(step), staged.locate(step))
    assert set(staged.locate(500)[0]) == {1}


def test_a_late_step_of_a_late_stage_agrees_with_python_integers():
    sources = [source(f"s{i}", share, rows=97) for i, share in enumerate((0.1, 3.3, 7e-5))]
    mixture = Mixture(sources, seed=3, batch_rows=13, stages=stages((1_000_000, {"s0": 1 / 3, "s2": 1.0})))
    for step in (999_999, 1_000_000, 2**40):
        counts = mixture.rows_before(step * 13)
        source_ids, _ = mixture.locate(step)
        for index in range(3):
            assert mixture.rows_before(step * 13 + 13)[index] - counts[index] == (source_ids == index).sum()


def config_with(**stages):
    config = default_config(preset("tiny").to_dict())
    config.data.sources = {
        name: {"share": 1.0, "packing": "concat", "max_epochs": 0.0} for name in ("code", "text")
    }
    config.data.stages = stages
    return from_config_dict(config)


def test_stages_of_a_config():
    shares = {"code": 1.0, "text": 2.0}
    config = config_with(anneal={"step": 900, "shares": shares})
    assert config.data.stages == {"anneal": StageConfig(step=900, shares=shares)}
    assert config_with().data.stages == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 900, "shares": {"cod": 1.0}}, r"anneal\.shares names 'cod', .*did you mean 'code'"),
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
    with pytest.raises(UserError, match=r"data\.stages\.a and config\.data\.stages\.b both begin at step 5"):
        config_with(**{name: {"step": 5, "shares": {"code": 1.0}} for name in "ab"})
