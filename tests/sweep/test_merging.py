"""Merged weights against NumPy in float64."""

import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.sweep.merging import merged, plan_merges
from lemur_jax.sweep.runs import plan_runs
from tests.helpers.sweeps import config_of


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "a": {"b": rng.normal(size=(3, 4)).astype(np.float32)},
        "c": rng.normal(size=5).astype(np.float32),
    }


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.5])
def test_weights(weight):
    base, one, two = (tree(seed) for seed in range(3))
    wide = [{"b": x["a"]["b"].astype(np.float64), "c": x["c"].astype(np.float64)} for x in (base, one, two)]
    linear = merged(base, [one], weight)
    np.testing.assert_allclose(linear["c"], (1 - weight) * wide[0]["c"] + weight * wide[1]["c"], rtol=1e-5)
    both = merged(base, iter([one, two]), weight)
    expected = wide[0]["b"] + weight * ((wide[1]["b"] - wide[0]["b"]) + (wide[2]["b"] - wide[0]["b"]))
    np.testing.assert_allclose(both["a"]["b"], expected, rtol=1e-4, atol=1e-6)


def test_which_runs_are_merged():
    runs = plan_runs(config_of(), ["1:0", "10:1", "0:1"], 2)
    merges = plan_merges(["linear:0.5", "arithmetic:0.4", "linear:.50"], runs)
    linear = [merge for merge in merges if merge.kind == "linear"]
    assert [merge.parts[0].name for merge in linear] == [run.name for run in runs]
    arithmetic = [merge for merge in merges if merge.kind == "arithmetic"]
    assert [merge.name for merge in arithmetic] == [
        "arithmetic-0.4_1-0_seed-42+0-1_seed-42",
        "arithmetic-0.4_1-0_seed-43+0-1_seed-43",
    ]
    assert {merge.variant for merge in arithmetic} == {"1:0 + 0:1, arithmetic 0.4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "cannot read --merge") for text in ("linear", "linear:x", "linear:inf", "mean:0.5")),
        ("arithmetic:1", "sweep two such ratios"),  # 10:1 is of two parts
    ],
)
def test_bad_input(text, message):
    with pytest.raises(UserError, match=message):
        plan_merges([text], plan_runs(config_of(), ["1:0", "10:1"], 2))
