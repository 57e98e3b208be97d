"""The law of a sweep: found again from its own figures, and tested on what `docs/harmony/` measured."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lemur_jax.config import replace
from lemur_jax.data.config import StageConfig
from lemur_jax.sweep import law, pareto, results
from lemur_jax.sweep.law import Law, Point, fit_laws
from lemur_jax.sweep.runs import plan_runs, shares_of
from tests.helpers.sweeps import config_of, variant, write_run

HARMONY = Path(__file__).parents[2] / "docs/harmony/ratio"
RATIOS = ("1:0", "10:1", "3:1", "1:1", "1:3", "0:1")
TRUE = {
    "code": Law(base=2.0, part=0, scale=3000.0, drift=-0.002, gain=0.03),
    "text": Law(base=1.5, part=1, scale=5000.0, drift=0.02, gain=0.025),
}


def point(ratio, tokens, bits):
    return Point(ratio=ratio, shares=shares_of(ratio), tokens=tokens, bits=bits)


def made_up(ratios=RATIOS, tokens=(50_000, 200_000)):
    return [
        point(ratio, count, {name: one.bits(shares_of(ratio), count) for name, one in TRUE.items()})
        for ratio in ratios
        for count in tokens
    ]


def test_a_law_is_found_again():
    found = fit_laws({"text": 1.5, "code": 2.0}, made_up(), "code")
    for name, true in TRUE.items():
        assert found.laws[name].part == true.part
        assert found.laws[name].drift == pytest.approx(true.drift, abs=5e-4)
        assert found.laws[name].gain == pytest.approx(true.gain, rel=0.05)
    assert set(found.held_out) == {"10:1", "3:1", "1:1", "1:3"}
    assert max(abs(error) for one in found.held_out.values() for error in one.values()) < 1e-4
    # At the best share the derivatives of both laws, weighted, cancel: worked out apart from the grid.
    for weight in (0.5, 0.8):
        share, n = found.best_share(weight), found.tokens
        slope = weight * 0.03 * n / (3000 + share * n) - (1 - weight) * 0.025 * n / (5000 + (1 - share) * n)
        assert abs(slope) < 1e-3
    assert found.best_share(0.8) > found.best_share(0.5)
    assert found.best_measured(0.5) == "1:1"
    # Two groups alike share the weight of one.
    points = [dataclasses.replace(one, bits={**one.bits, "web": one.bits["text"]}) for one in made_up()]
    more = fit_laws({"text": 1.5, "web": 1.5, "code": 2.0}, points, "code")
    assert more.best_share(0.5) == pytest.approx(found.best_share(0.5), abs=1e-3)


@pytest.mark.parametrize(("share", "ratio"), [(0.0, "0:1"), (0.25, "0.33:1"), (0.995, "200:1"), (1.0, "1:0")])
def test_the_best_share_is_a_ratio_as_it_is_typed(monkeypatch, share, ratio):
    monkeypatch.setattr(law.Laws, "best_share", lambda *_: share)
    found = fit_laws({"text": 1.5, "code": 2.0}, made_up(), "code")
    assert law.best_rows(found, [0.5])[1][2] == ratio


def test_it_needs_two_parts_and_four_ratios():
    base = {"code": 2.0, "text": 1.5}
    assert fit_laws(base, made_up(RATIOS[:3]), "code") is None
    assert fit_laws(base, [Point(ratio="1:1:1", shares=(1 / 3,) * 3, tokens=1, bits=base)], "code") is None


def test_runs_with_stages_have_no_law(tmp_path):
    config = replace(config_of(), {"train.steps": 10})
    runs = plan_runs(config, RATIOS, 1)
    for run in runs:
        write_run(tmp_path, run, {"code": 2.0, "text": 3.0}, {0: 1.0, 10: 0.5})
    staged = replace(config, {"data.stages": {"late": StageConfig(step=5, shares={"code": 1.0})}})
    for each, fitted in ((config, True), (staged, False)):
        assert bool(results.read_results(dict.fromkeys(runs, each), [], tmp_path).laws) == fitted


def test_it_predicts_a_ratio_that_was_left_out_of_the_measured_sweep():
    """docs/harmony/ratio: 1.8M parameters, six ratios, three seeds."""
    found = json.loads((HARMONY / "results.json").read_text())
    points = [
        point(
            one["name"], found["tokens"], {group: float(np.mean(bits)) for group, bits in one["bits"].items()}
        )
        for one in found["variants"]
        if not one["merged"]
    ]
    laws = fit_laws(found["base"], points, "code")
    assert {group: one.part for group, one in laws.laws.items()} == {"code": 0, "text": 1}
    errors = [abs(error) for one in laws.held_out.values() for error in one.values()]
    assert len(errors) == 8
    assert max(errors) < 0.0016  # of bits per byte that the mixtures change by up to 0.16
    assert pareto.law_plot(laws) == (HARMONY / "law.svg").read_text()
    page = (HARMONY.parents[1] / "harmony.md").read_text()
    for row in (*law.law_rows(laws), *law.best_rows(laws)):  # the page has these figures
        assert f"| {' | '.join(row)} |" in page
    assert laws.best_measured(0.5) == "3:1"
    assert 0.6 < laws.best_share(0.5) < 0.9


def test_points_on_the_way_count_where_the_learning_rate_is_constant(tmp_path):
    config = replace(config_of(), {"train.steps": 10, "optimizer.warmup_steps": 2})
    runs = plan_runs(config, ["1:1"], 2)
    for run, factor in zip(runs, (1.0, 2.0), strict=True):
        changes = {step: factor * (step + 1) for step in (0, 2, 5, 10)}
        write_run(tmp_path, run, dict.fromkeys(("code", "text"), 1.0), changes)
    groups = config.eval.task_groups
    tokens = config.train.batch_rows * config.data.sequence_length

    def points(rate):
        configs = dict.fromkeys(runs, replace(config, {"optimizer.final_learning_rate": rate}))
        return law.read_points(configs, tmp_path, groups)

    constant = points(config.optimizer.learning_rate)
    assert [point.tokens for point in constant] == [5 * tokens, 10 * tokens]
    assert [point.bits["code"] for point in constant] == pytest.approx([9.0, 16.5])
    assert [point.tokens for point in points(1e-5)] == [10 * tokens]


def test_the_page_shows_the_law():
    base = {"code": 2.0, "text": 1.5}
    last = made_up(tokens=[200_000])
    variants = tuple(variant(one.ratio, *([bits] for bits in one.bits.values())) for one in last)
    plain = results.Results(base=base, variants=variants, steps=10, tokens=200_000)
    found = dataclasses.replace(plain, laws=fit_laws(base, made_up(), "code"))
    files = pareto.result_files(found, "lemur sweep")
    assert files["law.svg"].count(' curve"') == 2
    assert files["law.svg"].count("<title>code, ") == len(RATIOS)
    assert "| weight of code | best share, predicted |" in files["table.md"]
    assert "without 3:1" in files["index.html"]
    json.dumps(results.to_json(found))
    assert "law.svg" not in pareto.result_files(plain, "")
