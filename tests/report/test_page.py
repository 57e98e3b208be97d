"""The page: complete, self-contained, and safe against names that are HTML."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.report import write_report
from lemur_jax.telemetry.metrics import MetricsWriter


class Outline:
    """The page read as XML, which its elements must nest for: tags, rows of tables, titles of charts and samples."""

    def __init__(self, text: str):
        text = re.sub(r"<!doctype html>|<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
        text = re.sub(r"<((?:meta|wbr|input)\b[^>]*)>", r"<\1/>", text).replace(" hidden>", ">")
        tree = ElementTree.fromstring(text)
        self.tags = {element.tag for element in tree.iter()}
        self.rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
        self.titles = ["".join(title.itertext()) for title in tree.iter("h3")]


def written(workdirs, output) -> tuple[str, Outline]:
    text = write_report(workdirs, output).read_text(encoding="utf-8")
    return text, Outline(text)


def figures(text: str) -> list[dict]:
    """The data of every line chart."""
    return [json.loads(data) for data in re.findall(r'<script type="application/json">(.*?)</script>', text)]


def test_the_page_has_all_its_parts(stages, tmp_path):
    text, outline = written(stages, tmp_path / "report.html")
    losses = ["Training loss", "Held-out bits per byte", "Held-out loss"]
    assert outline.titles == [*losses, "Learning rate", "Gradient norm", "Throughput"]
    assert [row[0] for row in outline.rows[1:4]] == ["base", "lemur", "chat"]
    assert outline.rows[1] == ["base", "151.9k", "40", "40k", "262,144128 × 2,048", "2.000", "500"]
    assert outline.rows[4] == ["run", "python_docs", "python_stdlib", "python_chat"]
    assert outline.rows[6] == ["lemur", "2.1000▲ +5.0% vs base", "3.0000▼ -25.0% vs base", "–"]
    assert outline.rows[7][1] == "2.0000± 0.0% vs base▼ -4.8% vs lemur"
    for unit in ("nats per target token", "bits per byte of text", "tokens per second", "updates"):
        assert unit in text
    limits = [line["y"] for figure in figures(text) for line in figure["lines"] if line["dashed"]]
    assert limits == [[1.0, 1.0]] * 3  # of each run's gradient norm
    # What differs between the configs, and all options below.
    assert "1 option differs" in text
    assert ["seed", "0", "1", "2"] in outline.rows
    assert ["optimizer.clip_norm", "1"] in outline.rows
    assert ["tokenizer.path", '""'] in outline.rows
    # The page needs no network.
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|//[a-z]|url\((?!#)|@import|\bsrc=|\bhref=|fetch\(", text)
    assert not outline.tags & {"link", "img", "iframe", "object"}


def test_time_mixture_and_samples(stages, tmp_path):
    evil = "def f(</pre>"
    answers = {stage.name: [f"{stage.name} says <b>"] for stage in stages}
    path = write_report(stages, tmp_path / "report.html", prompts=[evil], answers=answers)
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    assert ["run", "wall time", "steps", "startup", "compile", "lost steps"] in outline.rows
    shares = ["80.0%1 h 40 min", "0.8%1 min 00 s", "7.2%9 min 00 s", "12.0%15 min 00 s"]
    assert ["lemur", "2 h 05 min", *shares] in outline.rows
    assert ["chat", "python_stdlib", "30k", "75.00%", "80.00%"] in outline.rows
    assert text.count("def f(&lt;/pre&gt;</span>") == 3
    assert "base says &lt;b&gt;</pre>" in text


def test_a_source_that_no_batch_had_has_its_share_and_stages_have_no_single_one(write_stage, tmp_path):
    sources = {
        name: {"share": share}
        for name, share in (("python_docs", 1.0), ("python_stdlib", 3.0), ("rare", 1.0))
    }
    stages = {"late": {"step": 20, "shares": {"rare": 1.0}}}
    runs = [
        write_stage(tmp_path / name, {}, data={"sources": sources, "stages": more})
        for name, more in (("flat", {}), ("staged", stages))
    ]
    for run in runs:
        with MetricsWriter(run) as writer:
            tokens = {"tokens/python_docs": 250, "tokens/python_stdlib": 750, "tokens/rare": 0}
            writer.write({"step": 41, "kind": "train", "loss": 1.0, "tokens": 1000, **tokens})
    _, outline = written(runs, tmp_path / "report.html")
    assert ["flat", "python_docs", "250", "25.00%", "20.00%"] in outline.rows
    assert ["flat", "rare", "0", "0.00%", "20.00%"] in outline.rows
    assert ["staged", "rare", "0", "0.00%", "by stage"] in outline.rows


def test_one_run_stands_alone(stages, tmp_path):
    text, outline = written(stages[1:2], tmp_path / "report.html")
    assert "differ" not in text
    assert " vs " not in text
    assert 'class="view"' not in text
    assert outline.rows[3] == ["lemur", "2.1000", "3.0000"]


def test_a_run_on_its_way_shows_how_far_it_is(write_stage, tmp_path):
    workdir = write_stage(tmp_path / "run", {}, steps=30, planned=4000)
    text, outline = written([workdir], tmp_path / "report.html")
    assert outline.rows[1][2] == "30of 4,000"
    assert "No held-out evaluation has run yet" in text
    assert "Held-out loss" not in outline.titles


def test_what_only_some_runs_record_has_a_chart_too(stages, tmp_path):
    """As `lemur rl` records rewards, and success now and then."""
    with MetricsWriter(stages[2]) as writer:
        for step in (41, 42, 43):
            record = {"step": step, "kind": "train", "loss": 1.0, "reward": 0.25, "episodes/cut": 3}
            writer.write(record | {"host_seconds/1": 2.0} | ({"held_out_success": 0.5} if step == 42 else {}))
    text, outline = written(stages, tmp_path / "report.html")
    assert outline.titles[3:6] == ["reward", "episodes/cut", "held_out_success"]
    assert "mean of what the objective counts" in text
    (success,) = [figure for figure in figures(text) if figure["title"] == "held_out_success"]
    assert [(line["run"], line["x"], line["y"]) for line in success["lines"]] == [(2, [42], [0.5])]


def test_balance_and_one_colour_for_each_name(stages, tmp_path):
    for stage, groups in ((stages[1], ("code", "text")), (stages[2], ("text", "code"))):
        with MetricsWriter(stage) as writer:
            changes = {f"change/{group}": -0.02 for group in groups}
            writer.write({"step": 40, "kind": "balance", "balance": 0.0123, **changes})
    text, outline = written(stages, tmp_path / "report.html")
    assert "Since the start of the run" in outline.titles
    score = "+1.2%since its start"
    assert [row[-1] for row in outline.rows[4:8]] == ["balance", "–", score, score]
    colours = {}
    for figure in figures(text):
        for line in figure["lines"]:
            assert colours.setdefault(line["name"], line["colour"]) == line["colour"]
        runs = {run["name"]: run["colour"] for run in figure["runs"]}
    names = ("all sources", "python_docs", "python_stdlib", "python_chat", "code, change", "text, change")
    assert len({*(colours[name] for name in names), *runs.values()}) == 9


def test_names_cannot_break_the_page(write_stage, tmp_path):
    evil = "</script><script>alert(1)</script>&\"'"
    # The last character is a byte that is no UTF-8, as Python gives it.
    workdir = write_stage(tmp_path / "a <b>&run\udcff", {evil: 1.5}, init={"checkpoint": evil})
    text, outline = written([workdir], tmp_path / "report.html")
    assert "alert(1)</script>" not in text
    assert ["init.checkpoint", evil] in outline.rows
    assert any(line["name"] == evil for figure in figures(text) for line in figure["lines"])


def test_runs_to_compare_one_of_them_without_config(stages, tmp_path):
    (stages[1] / "config.json").unlink()
    text = write_report(stages, tmp_path / "report.html", overlay=True).read_text(encoding="utf-8")
    assert "lemur has no config.json" in text
    assert ["seed", "0", "2"] in Outline(text).rows
    assert '<body data-overlay="1">' in text
    assert "<h1>base, lemur, chat</h1>" in text
    assert "after each stage" not in text


def test_starts_that_differ_are_listed(stages, tmp_path):
    facts = {"kind": "start", "unix_seconds": 365 * 86_400, "host": "a & 1 more", "devices": "8 × TPU v4"}
    with MetricsWriter(stages[1]) as writer:
        for step, commit in ((0, "aaa"), (10, "aaa"), (20, "bbb-dirty")):
            writer.write({"step": step, "commit": commit, "versions": ["jax 0.10", "flax 0.12"], **facts})
    _, outline = written(stages, tmp_path / "report.html")
    rest = ["a & 1 more", "8 × TPU v4", "jax 0.10, flax 0.12"]
    assert ["lemur", "1971-01-01 00:00 UTC", "0", "aaa", *rest] in outline.rows
    assert ["lemur", "1971-01-01 00:00 UTC", "20", "bbb-dirty", *rest] in outline.rows
    assert not [row for row in outline.rows if row[2:4] == ["10", "aaa"]]


def test_lines_that_cannot_be_read_are_counted(stages, tmp_path):
    with open(stages[1] / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\n{\n\n{"step": "x", "kind": "train"}\n{"step": 41, "ki')
    text, _ = written(stages, tmp_path / "report.html")
    assert "3 unreadable lines in the metrics of lemur were skipped" in text


def test_a_page_that_cannot_be_written_is_one_line(stages, tmp_path):
    with pytest.raises(UserError, match=r"cannot write the report to .*: Is a directory"):
        write_report(stages, tmp_path)
