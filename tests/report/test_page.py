"""The page: whole, self-contained, safe against odd names, and alive in a browser where there is one."""

import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.report import report
from lemur_jax.telemetry.metrics import MetricsWriter

VOID = {"meta", "br", "wbr", "path", "link", "img"}


class Outline(html.parser.HTMLParser):
    """Checks that elements nest, and gathers the text of tables and headings."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "h3":
            self.titles.append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "h3" in self.open:
            self.titles[-1] += data


def written(workdirs, output) -> tuple[str, Outline]:
    text = report(workdirs, output).read_text(encoding="utf-8")
    return text, Outline(text)


def test_what_changed_since_the_start_of_a_stage(stages, tmp_path):
    with MetricsWriter(stages[1]) as writer:
        writer.write({"step": 40, "kind": "balance", "balance": 0.0123, "change/code": -0.02})
    text, outline = written(stages, tmp_path / "report.html")
    assert "Since the start of the stage" in outline.titles
    assert [row[-1] for row in outline.rows[4:8]] == ["balance", "–", "+1.2%since its start", "–"]
    assert "code, change" in text


def test_a_group_has_one_colour_in_all_stages(stages, tmp_path):
    for stage, groups in ((stages[1], ("code", "text")), (stages[2], ("chat", "code", "text"))):
        with MetricsWriter(stage) as writer:
            changes = {f"change/{group}": -0.02 for group in groups}
            writer.write({"step": 40, "kind": "balance", "balance": 0.01, **changes})
    text, _ = written(stages, tmp_path / "report.html")
    found = re.findall(r'"name":"(code|text|chat), change","colour":(\d+)', text)
    assert len(found) == 5
    assert len(set(found)) == 3


def test_the_page_has_all_its_parts(stages, tmp_path):
    text, outline = written(stages, tmp_path / "new" / "report.html")
    assert outline.titles == [
        "Training loss",
        "Held-out bits per byte",
        "Held-out loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
    ]
    assert [row[0] for row in outline.rows[1:4]] == ["base", "lemur", "chat"]
    assert outline.rows[1] == ["base", "151.9k", "40", "40k", "262,144128 × 2,048", "2.000", "500"]
    assert outline.rows[4] == ["stage", "python_docs", "python_stdlib", "python_chat"]
    assert outline.rows[6] == ["lemur", "2.1000▲ +5.0% vs base", "3.0000▼ -25.0% vs base", "–"]
    assert outline.rows[7][1] == "2.0000± 0.0% vs base▼ -4.8% vs lemur"
    for unit in (
        "nats per target token",
        "bits per byte of text",
        "tokens per second",
        "updates in each stage",
    ):
        assert unit in text


def test_the_page_needs_no_network(stages, tmp_path):
    text, outline = written(stages, tmp_path / "report.html")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|//[a-z]|url\(|@import|\bsrc=|\bhref=|fetch\(", text)
    assert not outline.tags & {"link", "img", "iframe", "object"}


def test_only_what_differs_is_in_the_diff_and_all_is_below(stages, tmp_path):
    text, outline = written(stages, tmp_path / "report.html")
    assert "1 option differs" in text
    assert ["seed", "0", "1", "2"] in outline.rows
    assert ["optimizer.clip_norm", "1"] in outline.rows
    assert ["tokenizer.path", '""'] in outline.rows


def test_time_mixture_and_samples(stages, tmp_path):
    evil = "def f(</pre>"
    answers = [[f"{stage.name} says <b>" + "\n" * 60] for stage in stages]
    text = report(stages, tmp_path / "report.html", [evil], answers).read_text(encoding="utf-8")
    outline = Outline(text)
    assert ["stage", "wall time", "steps", "startup", "compile", "lost steps"] in outline.rows
    assert [
        "lemur",
        "2 h 05 min",
        "80.0%1 h 40 min",
        "0.8%1 min 00 s",
        "7.2%9 min 00 s",
        "12.0%15 min 00 s",
    ] in (outline.rows)
    assert ["chat", "python_stdlib", "30k", "75.00%", "80.00%"] in outline.rows
    assert text.count("def f(&lt;/pre&gt;</span>") == 3
    assert 'base says &lt;b&gt;\n<span class="soft">[60 line breaks]</span>\n' in text


def test_one_run_stands_alone(stages, tmp_path):
    text, outline = written(stages[1:2], tmp_path / "report.html")
    assert "differ" not in text
    assert " vs " not in text
    assert "in each stage" not in text
    assert outline.rows[3] == ["lemur", "2.1000", "3.0000"]


def test_a_run_on_its_way_shows_how_far_it_is(write_stage, tmp_path):
    workdir = write_stage(tmp_path / "run", {}, steps=30, planned=4000)
    text, outline = written([workdir], tmp_path / "report.html")
    assert outline.rows[1][2] == "30of 4,000"
    assert "No held-out evaluation has run yet" in text
    assert "Held-out loss" not in outline.titles


def test_a_colour_means_the_same_source_everywhere(stages, tmp_path):
    text, _ = written(stages, tmp_path / "report.html")
    colours = {}
    for colour, name in re.findall(r'<li class="(c\d)[^"]*">([^<]*)', text):
        assert colours.setdefault(name, colour) == colour
    sources = [colours[name] for name in ("all sources", "python_docs", "python_stdlib", "python_chat")]
    assert len(set(sources)) == 4


def test_names_cannot_break_the_page(write_stage, tmp_path):
    evil = "</script><script>alert(1)</script>&\"'"
    workdir = write_stage(tmp_path / "a <b>&run", {evil: 1.5}, init={"checkpoint": evil})
    text, outline = written([workdir], tmp_path / "report.html")
    assert "alert(1)</script>" not in text
    assert ["init.checkpoint", evil] in outline.rows
    data = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert any(series["name"] == evil for figure in data for series in json.loads(figure)[0]["series"])


def test_a_run_without_config_is_told(stages, tmp_path):
    (stages[1] / "config.json").unlink()
    text, outline = written(stages, tmp_path / "report.html")
    assert "lemur has no config.json" in text
    assert ["seed", "0", "2"] in outline.rows


def test_mistakes_leave_nothing_behind(stages, tmp_path):
    output = tmp_path / "report.html"
    with pytest.raises(UserError, match=r"no metrics.jsonl in .*/absent"):
        report([*stages, tmp_path / "absent"], output)
    assert not output.exists()
    with pytest.raises(UserError, match=r"cannot write the report to .*: Is a directory"):
        report(stages, tmp_path)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page, *words):
    """What headless chromium prints."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    options += " --disable-sync --disable-component-update --hide-scrollbars"
    command = [CHROMIUM, *options.split(), profile, *words, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="looks at the page in chromium, and there is none on PATH")
def test_the_page_answers_a_pointer_in_a_browser(stages, tmp_path):
    text, _ = written(stages, tmp_path / "report.html")
    probe = """<script>
    const area = document.querySelectorAll(".area")[4], box = area.getBoundingClientRect();
    const x = box.left + box.width / 2;
    area.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: box.top + 9}));
    </script></body>"""
    # The probe's own script needs no exception: the page allows inline ones.
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    shown = browse(tmp_path / "probe.html", "--dump-dom")
    tips = re.findall(r'<output class="tip"[^>]*>(.*?)</output>', shown)
    assert re.sub("<[^>]*>", "|", tips[1]) == "update 20|python_docs  2.6||python_stdlib  3.5|"


@pytest.mark.skipif(CHROMIUM is None, reason="looks at the page in chromium, and there is none on PATH")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_follows_dark_mode(stages, tmp_path, dark):
    """Nothing but tables may be wider than the screen, and text stands out from what is behind it."""
    answers = [["    return x" * 40]] * 3
    text = report(stages, tmp_path / "report.html", ["def f(x):"], answers).read_text(encoding="utf-8")
    frame = """<body><iframe style="width:390px;height:800px" srcdoc="PAGE"></iframe><script>
    onload = () => {
      const page = document.querySelector("iframe").contentDocument, colour = getComputedStyle(page.body);
      const out = document.createElement("output");
      out.textContent = [page.documentElement.scrollWidth, colour.color, colour.backgroundColor].join(" / ");
      document.body.append(out);
    };
    </script></body>"""
    (tmp_path / "frame.html").write_text(frame.replace("PAGE", html.escape(text)), encoding="utf-8")
    mode = (
        ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    )
    shown = browse(tmp_path / "frame.html", *mode, "--dump-dom")
    width, front, back = re.search(r"<output>(.*?)</output>", shown)[1].split(" / ")
    assert int(width) <= 390
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (front, back)]
    assert (
        (brightness[0] > 0.8 and brightness[1] < 0.2)
        if dark
        else (brightness[0] < 0.2 and brightness[1] > 0.8)
    )
