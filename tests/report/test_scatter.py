"""Labels of scatter plots, read back from the SVG with everything else that is drawn."""

import itertools
import json
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from lemur_jax.report import charts, labels
from lemur_jax.sweep import pareto
from lemur_jax.sweep.results import Results, Variant
from tests.helpers.sweeps import variant

SPACE = {"s": "http://www.w3.org/2000/svg"}
HARMONY = pathlib.Path(__file__).parents[2] / "docs" / "harmony"
COMMITTED = ("ratio", "rewarm", "anneal", "constant")


def committed(name):
    found = json.loads((HARMONY / name / "results.json").read_text())
    variants = tuple(Variant(**one) for one in found["variants"])
    return Results(base=found["base"], variants=variants, steps=found["steps"], tokens=found["tokens"])


def random(seed):
    """Clusters of points with long names and long error bars."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(2.0, 2.5, (3, 2))
    variants = []
    for number in range(12):
        middle = centres[number % 3] + rng.normal(0, 0.02, 2)
        bits = middle + rng.normal(0, [0.03, 0.005], (3, 2))
        variants.append(variant(f"{number}:1, learning_rate 3e-4", *bits.T, merged=number % 2 == 0))
    return Results(base={"code": 2.4, "text": 2.3}, variants=tuple(variants), steps=1, tokens=1)


def names(root, results):
    """Box of each name."""
    wanted = {*(one.name for one in results.variants), "base"}
    found = {}
    for text in root.findall("s:text", SPACE):
        if text.text in wanted:
            width, _ = labels.text_size(text.text, "front-name" in text.get("class"))
            share = {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
            left, baseline = float(text.get("x")) - share * width, float(text.get("y"))
            found[text.text] = left, baseline - 11, left + width, baseline + 3
    assert found.keys() == wanted
    return found


def drawn(root):
    """Boxes of points, seeds, error bars and the base's cross."""
    for circle in root.findall("s:circle", SPACE):
        x, y, radius = (float(circle.get(key)) for key in ("cx", "cy", "r"))
        yield x - radius, y - radius, x + radius, y + radius
    for path in root.findall("s:path", SPACE):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d"))]
        if "bar" in path.get("class").split():
            x, y, wide, up, top, tall = numbers
            yield x, y - 0.75, x + wide, y + 0.75
            yield up - 0.75, top, up + 0.75, top + tall
        if "cross" in path.get("class"):
            x, y = numbers[:2]
            yield x, y, x + 12, y + 12


@pytest.mark.parametrize("name", [*COMMITTED, *range(6)])
def test_names_cover_no_bar_no_point_and_no_other_name(name):
    results = random(name) if isinstance(name, int) else committed(name)
    root = ElementTree.fromstring(pareto.pareto_plot(results, "text", "code"))
    found = names(root, results)
    for name, box in found.items():
        assert box[0] >= charts.MARGINS[0], name
        assert box[2] <= 760, name
        assert not [other for other in drawn(root) if labels.overlap(box, other)], name
    for one, other in itertools.combinations(found, 2):
        assert not labels.overlap(found[one], found[other]), (one, other)


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_plots_are_drawn_from_the_committed_figures(name):
    plot = (HARMONY / name / "pareto.svg").read_text()
    assert pareto.pareto_plot(committed(name), "text", "code") == plot
    assert plot in (HARMONY / name / "index.html").read_text()


def test_a_name_is_near_its_mark_or_a_line_leads_to_it():
    size, mark, inside = labels.text_size("name"), (100.0, 100.0), (0.0, 0.0, 500.0, 500.0)
    (near,) = labels.place_labels([size], [mark], [], inside)
    assert near.leader is None
    (crowded,) = labels.place_labels([size], [mark], [(60.0, 70.0, 160.0, 130.0)], inside)
    assert not labels.overlap(crowded.box, (60, 70, 160, 130))
    assert crowded.leader[1] == mark
    (full,) = labels.place_labels([size], [mark], [inside], inside)  # there is no free place
    assert labels.contains(inside, full.box)
    size = labels.text_size("a name that is wider than the plot " * 3)
    (wide,) = labels.place_labels([size], [mark], [], inside)
    assert mark[0] < wide.box[0] < mark[0] + labels.NEAR
