"""The balance score has the properties that docs/evaluation.md claims."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemur_jax.train.balance import balance, group_ratios
from lemur_jax.train.config import EvalConfig

ratios = st.floats(0.2, 5.0)


@given(st.lists(ratios, min_size=1, max_size=5), st.integers(0, 4), st.floats(0.5, 0.99))
def test_better_in_one_part_is_better(values, index, factor):
    index %= len(values)
    better = [value * factor if i == index else value for i, value in enumerate(values)]
    assert balance(dict(enumerate(better))) > balance(dict(enumerate(values)))


@given(ratios, st.integers(1, 5))
def test_the_same_change_everywhere_is_the_score(ratio, count):
    assert balance(dict.fromkeys(range(count), ratio)) == pytest.approx(1 - ratio)


@given(ratios, ratios)
def test_of_equal_gains_on_average_the_even_one_is_best(one, two):
    even = math.sqrt(one * two)
    assert balance({"a": even, "b": even}) >= balance({"a": one, "b": two}) - 1e-12


def test_by_hand():
    # Code 20% lower, text the same: mean log ratio ln(0.8) / 2, the worst 0.
    assert balance({"code": 0.8, "text": 1.0}) == pytest.approx(1 - 0.8**0.25)
    # What is gained on one side and lost on the other is a loss.
    assert balance({"code": 0.8, "text": 1 / 0.8}) < 0


def test_groups_are_geometric_means_over_the_tasks_known_at_the_start():
    first = {"python": 2.0, "java": 4.0, "web": 1.0}
    now = {"python": 1.0, "java": 4.0, "web": 1.1, "new": 9.0}
    groups = {"code": ("python", "java"), "text": ("web",), "other": ("new",)}
    assert group_ratios(first, now, groups) == pytest.approx({"code": math.sqrt(0.5), "text": 1.1})


def test_without_groups_each_task_is_one():
    assert EvalConfig(tasks=("a", "b")).task_groups == {"a": ("a",), "b": ("b",)}
