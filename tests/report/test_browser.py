"""The page in a browser: what its script draws, and what happens when it is used."""

import html
import json
import re
import shutil
import subprocess

import pytest

from lemur_jax.report import write_report
from lemur_jax.report.charts import compact
from lemur_jax.telemetry.metrics import MetricsWriter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on PATH")

# Two frames hold the page, as wide as a phone and as a screen; `check` fills `out` from their documents.
FRAME = """<body><iframe id="phone" style="width:390px;height:800px" srcdoc="PAGE"></iframe>
<iframe id="screen" style="width:1200px;height:800px" srcdoc="PAGE"></iframe><script>
onload = () => {
  const out = {}, pages = ["phone", "screen"].map(id => document.getElementById(id).contentWindow);
  CHECK
  const text = document.createElement("output");
  text.textContent = JSON.stringify(out);
  document.body.append(text);
};
</script></body>"""
LOOKS = """
  const style = getComputedStyle(pages[1].document.body);
  Object.assign(out, {colours: [style.color, style.backgroundColor],
    widths: pages.map(page => page.document.documentElement.scrollWidth)});
"""
USE = """
  const page = pages[1], doc = page.document, loss = doc.querySelector(".chart");
  const pathsOf = (box, kind) => [...box.querySelectorAll("path." + kind)].map(path => path.getAttribute("d"));
  const names = () => [...loss.querySelectorAll(".legend button")].map(button => button.textContent);
  const move = (box, kind, share) => {
    const svg = box.querySelector("svg"), area = svg.getBoundingClientRect(), left = area.left + 48;
    svg.dispatchEvent(new page.PointerEvent(kind,
      {clientX: left + share * (area.right - 10 - left), clientY: area.top + 50, pointerId: 1}));
  };
  const boxes = () => [...loss.querySelectorAll(".panel")];
  const ticks = box => [...box.querySelectorAll("text[text-anchor=middle]")].map(tick => tick.textContent);
  page.SVGElement.prototype.setPointerCapture = () => {};  // there is no such pointer
  out.names = names();
  out.panels = boxes().map(box => box.querySelector(".panel-title").textContent);
  const reward = [...doc.querySelectorAll(".chart")].find(chart => chart.querySelector("h3").textContent === "reward");
  out.reward = [...reward.querySelectorAll(".panel-title")].map(title => title.textContent);
  out.line = pathsOf(boxes()[0], "line")[0];
  out.scale = [...boxes()[0].querySelectorAll("text[text-anchor=end]")]
    .map(tick => [tick.textContent, +tick.getAttribute("y") - 4]);
  move(boxes()[0], "pointermove", 0.5);
  out.tip = boxes()[0].querySelector(".tip").innerText;
  const lines = pathsOf(boxes()[0], "line").length;
  loss.querySelectorAll(".legend button")[1].click();
  out.hidden = lines - pathsOf(boxes()[0], "line").length;
  out.hiddenElsewhere = doc.querySelectorAll(".legend [aria-pressed=false]").length;
  loss.querySelectorAll(".legend button")[1].click();
  move(boxes()[1], "pointerdown", 0.5); move(boxes()[1], "pointerup", 0.5);  // a tap
  out.tap = boxes()[1].querySelector(".tip").innerText;
  out.before = ticks(boxes()[0]);
  move(boxes()[0], "pointerdown", 0.25); move(boxes()[0], "pointermove", 0.5); move(boxes()[0], "pointerup", 0.5);
  out.zoomed = ticks(boxes()[0]);
  out.others = ticks(boxes()[1]);
  loss.querySelector(".reset").click();
  out.reset = ticks(boxes()[0]);
  const slider = doc.querySelector(".smoothing");
  slider.value = 0.9; slider.oninput();
  out.smooth = [pathsOf(boxes()[0], "line").length, pathsOf(boxes()[0], "pale").length];
  out.formula = page.eval("smooth([1, 3, null, 2], 0.5)");
  out.ticks = page.eval("[logTicks(0.5, 8), linearTicks(0, 40, 4), logTicks(1, 1e9)]");
  out.many = page.eval("scale(Array.from({length: 300000}, (_, i) => i), {}).ticks");
  out.compact = page.eval("[4e-5, -0.0025, 0.02, 1500, 3.2e6].map(compact)");
  doc.querySelector(".view[value=overlay]").click();
  out.overlay = [names(), boxes().map(box => box.querySelector(".panel-title").textContent)];
  const kinds = box => new Set([...box.querySelectorAll("path.line")].map(path => path.className.baseVal));
  out.mixed = boxes().map(box => kinds(box).size);
"""


def browse(tmp_path, text, check, mode=1) -> dict:
    """What `check` found in the page."""
    page = tmp_path / "frame.html"
    page.write_text(FRAME.replace("PAGE", html.escape(text)).replace("CHECK", check), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    options += " --disable-sync --disable-component-update --hide-scrollbars"
    options += f" --blink-settings=preferredColorScheme={mode}"
    options += f" --user-data-dir={tmp_path / 'profile'} --dump-dom {page.as_uri()}"
    shown = subprocess.run([CHROMIUM, *options.split()], capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search(r"<output>(\{.*?\})</output>", shown, re.DOTALL)[1]))


@pytest.fixture
def page(stages, tmp_path):
    with MetricsWriter(stages[2]) as writer:
        writer.write({"step": 40, "kind": "train", "loss": 2.0, "reward": 0.5})
    answers = {stage.name: ["    return x" * 40] for stage in stages}
    path = write_report(stages, tmp_path / "report.html", prompts=["def f(x):"], answers=answers)
    # `eval`, which the page itself forbids, reaches the functions of its script.
    return path.read_text(encoding="utf-8").replace(
        "script-src 'unsafe-inline'", "script-src 'unsafe-inline' 'unsafe-eval'"
    )


def test_the_curves_can_be_read_zoomed_smoothed_hidden_and_overlaid(page, tmp_path):
    found = browse(tmp_path, page, USE + LOOKS)
    assert found["widths"] == [390, 1200]
    assert found["names"] == ["all sources", "python_docs", "python_stdlib"]
    assert found["panels"] == ["base", "lemur", "chat"]
    assert found["reward"] == ["chat"]  # the only run that has it is named
    assert found["tip"].split("\n") == ["update 20", "all sources 3", "python_docs 3", "python_stdlib 4"]
    assert found["tap"].startswith("update 20")
    assert found["hidden"] == 1
    assert found["hiddenElsewhere"] == 3  # the source is also a task of two charts
    assert found["before"] == found["reset"] == found["others"] == ["0", "20", "40"]
    assert found["zoomed"] == ["10", "15", "20"]
    assert found["smooth"] == [6, 3]
    assert found["formula"] == [1, pytest.approx(7 / 3), None, pytest.approx(15 / 7)]
    assert found["ticks"][0] == [0.5, 1, 2, 5]
    assert found["ticks"][1] == [0, 10, 20, 30, 40]
    assert found["ticks"][2] == [1, 100, 1e4, 1e6, 1e8]
    assert found["many"] == [0, 1e5, 2e5, 3e5]
    assert found["compact"] == [compact(value) for value in (4e-5, -0.0025, 0.02, 1500, 3.2e6)]
    assert found["overlay"] == [["base", "lemur", "chat"], ["all sources", "python_docs", "python_stdlib"]]
    assert found["mixed"] == [6, 6, 6]  # three runs, smoothed and not

    (v0, p0), *_, (v1, p1) = ((float(text), place) for text, place in found["scale"])
    line = re.findall(r"([\d.]+) ([\d.]+)", found["line"])
    for step, (_, y) in enumerate(line, start=1):  # the line lies where the axis says
        assert float(y) == pytest.approx(p0 + (4 - step / 20 - v0) / (v1 - v0) * (p1 - p0), abs=0.3)
    assert len(line) == 40
    text, back = map(brightness, found["colours"])
    assert text < 0.2 < 0.8 < back


def test_dark_mode_turns_the_colours_round(page, tmp_path):
    text, back = map(brightness, browse(tmp_path, page, LOOKS, mode=0)["colours"])
    assert text > 0.8 > 0.2 > back


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765
