"""Each environment with the right action, wrong ones and none."""

import sys

import pytest

from lemur_jax.agents import environments
from lemur_jax.agents.environments import PythonEnvironment, block
from lemur_jax.agents.problems import Problem

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

DOUBLE = Problem(
    id="HumanEval/x",
    prompt='import math\n\ndef double(x):\n    """Twice x."""\n',
    head="",
    check="\ndef check(f):\n    assert f(2) == 4, 'two'\ncheck(double)\n",
)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x\n```python\na\n```\ny\n```\nb\n```", "b\n"),
        ("```python\nnever closed", "never closed"),
        ("plain", "plain"),
        ("```python3\na\n```\nIt adds.", "a\n"),
        ("```Python \r\na\r\nb\r\n```\r\n", "a\nb\n"),
        ("```python\na\n```\nprints\n```text\nb\n```", "a\n"),
        # A fence on one line is inline code.
        ("I'll run ```ls``` now:\n```bash\nls -l\n```\ndone", "ls -l\n"),
        ("only ```x``` here", "only ```x``` here"),
    ],
)
def test_block(answer, code):
    assert block(answer, "python") == code


@pytest.mark.parametrize(
    ("action", "verdict", "seen"),
    [
        ("Sure:\n```python\ndef double(x):\n  return math.floor(2 * x)\n```", "passed", "All tests passed."),
        ("```python\ndef double(x):\n    return x\n```", "wrong answer", "AssertionError: two"),
        ("```python\ndef double(x:\n```", "syntax", "SyntaxError"),
        ("```python\n```", "no code", "no code"),
        ("```python\nimport os; os._exit(0)\n```", "exited early", "exited early"),
    ],
)
def test_python(action, verdict, seen):
    environment = PythonEnvironment(DOUBLE)
    assert "double" in environment.reset()
    step = environment.step(action)
    assert (step.verdict, step.reward) == (verdict, float(verdict == "passed"))
    assert seen in step.observation


def test_every_sql_solution_is_right():
    for environment in environments.sql_environments():
        query = environments.QUESTIONS[environment.id.partition("/")[2]][1]
        assert environment.step(f"```sql\n{query};\n```").reward == 1


def test_sql_feedback():
    environment = environments.sql_environments()[0]
    assert environment.step("SELECT 1").observation == "Not the answer. 1 rows:\n[1]"
    assert environment.step("SELECT count(*) FROM books").verdict == "name"
    assert environment.step("SELEC").verdict == "syntax"
    assert environment.step("DROP TABLE book").reward == 0
    assert environment.step("SELECT count(*) FROM book").reward == 1  # the drop did not outlive its turn
    # Rows of any length and kind are shown in part.
    emoji = "replace(hex(zeroblob(3000)), '0', char(128512))"  # 12 bytes of JSON each
    assert environment.step("SELECT zeroblob(900000000)").observation == "Error: out of memory"
    for value in ("hex(zeroblob(300000))", "zeroblob(300000)", emoji, "1e999", "NULL"):
        step = environment.step(f"SELECT {value} FROM book, book AS other")
        assert (step.verdict, len(step.observation) < 2000) == ("wrong answer", True), step


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("count", "wc -l < log.txt > count.txt"),
        ("rename", 'for f in *.txt; do mv "$f" "${f%.txt}.md"; done'),
        ("errors", "grep ERROR log.txt > errors.txt"),
        ("sum", "awk '{s += $1} END {print s}' numbers.txt > sum.txt"),
    ],
)
def test_bash(name, script):
    (environment,) = (e for e in environments.bash_environments() if e.id == f"bash/{name}")
    environment.reset()
    try:
        assert environment.step("ls; no_such_command").verdict == "name"
        assert environment.step("echo hello > kept").reward == 0
        assert environment.step("cat kept; rm kept").observation.startswith("hello")
        assert environment.step(f"```bash\n{script}\n```").reward == 1
    finally:
        environment.close()
