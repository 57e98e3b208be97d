"""Tables and plots of a sweep worked out by hand."""

import contextlib
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from scipy import stats

from lemur_jax.common.errors import UserError
from lemur_jax.config import replace
from lemur_jax.sweep import pareto, results
from lemur_jax.sweep.results import Results, read_results
from lemur_jax.sweep.runs import plan_runs
from tests.helpers.sweeps import config_of, variant, write_run

FOUND = Results(
    base={"code": 3.0, "text": 2.0},
    variants=(
        variant("1:0", (2.0, 2.1, 2.2), (2.4, 2.5, 2.6)),
        variant("1:1", (2.3, 2.3, 2.3), (2.0, 2.1, 2.2)),
        variant("0:1", (3.0, 3.1, 3.2), (2.1, 2.2, 2.3)),
        variant("1:1, linear 0.5", (2.3, 2.3, 2.3), (1.9, 1.9, 1.9), merged=True),
    ),
    steps=10,
    tokens=5120,
)


def test_the_front_has_what_nothing_else_betters():
    assert [one.name for one in FOUND.front(["code", "text"])] == ["1:0", "1:1, linear 0.5"]
    assert [one.name for one in FOUND.front(["code"])] == ["1:0"]


def test_the_least_difference_is_that_of_a_block_design():
    bits = np.array([one.bits["text"] for one in FOUND.variants[:3]])
    bits[1, 2] += 0.05
    variants = tuple(variant(str(row), (1.0,) * 3, bits[row]) for row in range(3))
    found = dataclasses.replace(FOUND, variants=variants)
    # A linear model with an effect of every mixture and of every seed, fitted by least squares.
    mixture, seed = np.divmod(np.arange(9), 3)
    design = np.concatenate([np.eye(3)[mixture], np.eye(3)[seed][:, 1:]], axis=1)
    _, (error,), _, _ = np.linalg.lstsq(design, bits.reshape(-1))
    expected = stats.t.ppf(0.975, 4) * np.sqrt(error / 4 * (1 / 3 + 1 / 3))
    assert found.least_difference("text") == pytest.approx(expected)


def test_one_seed_tells_nothing_of_chance():
    one_seed = Results(base=FOUND.base, variants=(variant("1:0", (2.0,), (2.4,)),), steps=1, tokens=1)
    assert one_seed.least_difference("code") is None
    assert "not told apart" not in results.summary(one_seed)


def test_table():
    head, base, first, *_ = results.table_rows(FOUND)
    assert base[:4] == ["base", "", "3.0000", "2.0000"]
    assert first[:4] == ["1:0", "3", "2.1000 ± 0.1000", "2.5000 ± 0.1000"]
    assert first[4:] == ["-30.0%", "+25.0%", "+10.00% ± 0.00%", "yes"]
    assert all(len(line) == len(head) for line in results.table_rows(FOUND))
    content = json.loads(json.dumps(results.to_json(FOUND)))
    assert content["pareto"] == ["1:0", "1:1, linear 0.5"]
    assert content["variants"][0]["bits"]["code"] == [2.0, 2.1, 2.2]


def test_plot():
    files = pareto.result_files(FOUND, "lemur sweep --config \udcff.py --ratios '1:0,<x>'")
    assert set(files) == {"table.md", "index.html", "pareto.svg"}
    assert b"\\udcff.py" in files["table.md"].encode()
    root = ElementTree.fromstring(files["pareto.svg"])
    space = {"s": "http://www.w3.org/2000/svg"}
    circles = root.findall("s:circle", space)
    means = [c for c in circles if c.get("r") == "4.5"]
    assert len(means) == 4
    assert len(circles) == 4 + 12  # and one for each seed
    # Text runs across, code upwards: more of either lies further right, and higher.
    across = [float(c.get("cx")) for c in means]
    down = [float(c.get("cy")) for c in means]
    assert np.argsort(across).tolist() == np.argsort([one.mean("text") for one in FOUND.variants]).tolist()
    assert down[0] == max(down)
    assert down[2] == min(down)
    assert all(78 <= x <= 736 for x in across)
    names = [text.text for text in root.findall("s:text", space)]
    assert {one.name for one in FOUND.variants} <= set(names)
    assert "1:0,&lt;x&gt;" in files["index.html"]
    assert re.findall(r"(src|href)=", files["index.html"]) == []
    # On a phone every value stands beside the name of its column, and labels are the numbers of the variants.
    assert '<td data-head="code, bits/byte">2.1000 ± 0.1000</td>' in files["index.html"]
    narrow = files["index.html"].partition('<div class="card scatter narrow">')[2]
    labels = re.findall(r'<text class="text[^>]*anchor="\w+">(\w+)</text>', narrow)
    assert labels == ["1", "2", "3", "4", "base"]


def test_a_group_with_a_slash_is_no_directory():
    names = ("web", "code/C++", "code/Python")
    bits = dict.fromkeys(names, (2.0, 2.1, 2.2))
    variants = tuple(dataclasses.replace(one, bits=bits) for one in FOUND.variants)
    found = dataclasses.replace(FOUND, base=dict.fromkeys(names, 3.0), variants=variants)
    plots = [name for name in pareto.result_files(found, "") if name.endswith(".svg")]
    assert plots == ["pareto.svg", "pareto-web-code-Python.svg", "pareto-code-C++-code-Python.svg"]


def test_figures_are_read_back_by_group(tmp_path):
    config = config_of(("python", "java", "web"), python=1.0, java=1.0, web=1.0)
    groups = {"code": ("python", "java"), "text": ("web",)}
    config = replace(config, {"eval.groups": groups, "train.steps": 10})
    runs = plan_runs(config, ["1:1"], 2, sources="python&java,web")
    bits = {"python": 2.0, "java": 8.0, "web": 3.0}
    for run, change in zip(runs, (0.5, 0.75), strict=True):
        write_run(tmp_path, run, bits, {0: 1.0, 5: 1.5, 10: change})
    found = read_results(dict.fromkeys(runs, config), [], tmp_path)
    assert found.base == pytest.approx({"code": 4.0, "text": 3.0})
    (only,) = found.variants
    assert only.bits["code"] == pytest.approx((2.0, 3.0))
    assert only.balance == (0.5, 0.25)
    assert found.tokens == 10 * config.train.batch_rows * config.data.sequence_length
    assert results.summary(found).startswith("10 updates and")
    # Runs of several lengths (--vary train.steps=10,20) have no size in common.
    longer = replace(config, {"train.steps": 20})
    found = read_results(dict(zip(runs, (config, longer), strict=True)), [], tmp_path)
    assert (found.steps, found.tokens) == (None, None)
    assert results.summary(found).startswith("Mean ± ")
    assert "tokens a run" not in pareto.pareto_plot(found, "text", "code")


@pytest.mark.parametrize(("factor", "same"), [(1.0001, True), (1.01, False)])
def test_a_base_that_goes_on_between_two_runs_is_told(tmp_path, factor, same):
    runs = plan_runs(config_of(), ["1:1"], 2)
    for run, change in zip(runs, (1.0, factor), strict=True):
        write_run(tmp_path, run, {"code": 2.0, "text": 3.0}, {0: change, 10: 0.5})
    wrong = pytest.raises(
        UserError, match=r"seed-43 has 2\.0200 bits per byte of code .*seed-42 2\.0000 .*init"
    )
    with contextlib.nullcontext() if same else wrong:
        read_results(dict.fromkeys(runs, config_of()), [], tmp_path)


@pytest.mark.parametrize("changes", [{10: 1.0}, {0: float("nan"), 10: 1.0}])
def test_a_run_without_a_start_is_named(tmp_path, changes):
    config = config_of()
    (run,) = plan_runs(config, ["1:1"], 1)
    write_run(tmp_path, run, {"code": 1.0}, changes)
    with pytest.raises(UserError, match="1-1_seed-42 has no held-out figure of code at step 0"):
        read_results({run: config}, [], tmp_path)
