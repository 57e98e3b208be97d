"""Environments as in MINT and InterCode: they take an action and return an observation and a reward.

Everything that an agent writes runs in the sandbox. A reward of 1 ends an episode.
"""

import abc
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.agents.problems import LIMITS, Problem, check
from lemur_jax.agents.sandbox import run
from lemur_jax.agents.scratch import make_directory, remove_tree
from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import Message

SHOWN = 1500  # characters of an observation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The result of an action.

    Attributes:
      observation: the text for the agent.
      reward: 1 if the task is solved, else 0.
      verdict: "passed", or a name for what went wrong; see `episodes.failure`.
      role: whose turn the observation is: "user", or "tool" for the result of a call.
      done: whether the episode ends without success.
    """

    observation: str
    verdict: str
    reward: float = 0.0
    role: str = "user"
    done: bool = False

    def __post_init__(self):
        # JSON can hold a lone surrogate, which cannot be written as UTF-8, and so not be tokenized.
        object.__setattr__(self, "observation", self.observation.encode(errors="replace").decode())


class NotScored(UserError):
    """A task that cannot run here. An evaluation names and counts it, and continues without it."""


class Environment(abc.ABC):
    """One task."""

    id: str
    content: Any = None  # data of the task, as JSON values; `lemur rl` resumes only with the same
    max_turns: int | None = None  # where its protocol fixes them
    stops: tuple[str, ...] = ()  # an action of an agent ends before the first of these
    cumulative_rewards = False  # whether a reward is for all turns so far, not for the last one alone
    conversation: Sequence[Message] = ()  # read by the agent in place of the task and all turns since

    @abc.abstractmethod
    def reset(self) -> str:
        """Starts, or starts again; returns the text of the task. Raises NotScored if it cannot run here."""

    @abc.abstractmethod
    def step(self, action: str) -> Step:
        """The result of an action. Raises NotScored if the task cannot go on here."""

    def as_turn(self, action: str) -> str:
        """The action as the conversation keeps it."""
        return action

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Frees what it holds."""


def find_data(data: str, file: str, where: str) -> pathlib.Path:
    """The directory `data`, or its `data/`, that holds a file; UserError, with where to get it, if none does."""
    for path in (pathlib.Path(data), pathlib.Path(data) / "data"):
        if (path / file).exists():
            return path
    raise UserError(f"--data {data} has no {file}: {where}")


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def block(action: str, *languages: str) -> str:
    """The last fenced block in one of the languages or without one, else the last block, else the whole answer."""
    # A fence that opens and closes on one line is inline code.
    text = re.sub(r"```[^\n`]+```", "", action.replace("\r\n", "\n"))
    blocks = re.findall(r"```([^\n`]*)\n(.*?)(?:```|\Z)", text, re.DOTALL)
    matching = [text for name, text in blocks if name.strip().lower() in ("", *languages)]
    return (matching or [text for _, text in blocks] or [action])[-1]


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}\n[...]\n{text[-SHOWN // 2 :]}"


EMPTY = Step(observation="Your answer contained no code.", verdict="no code")


class PythonEnvironment(Environment):
    """A HumanEval problem; the observation shows why the tests failed."""

    def __init__(self, problem: Problem):
        self.id = problem.id
        self._problem = problem

    def reset(self) -> str:
        return (
            "Complete this Python function. Answer with the whole function in one ```python block."
            f" It is tested, and you see what went wrong.\n\n```python\n{self._problem.prompt}\n```"
        )

    def step(self, action: str) -> Step:
        code = block(action, "python", "py")
        if not code.strip():
            return EMPTY
        # The prompt's imports and helpers are kept; the answer defines the function again.
        head = self._problem.prompt + "\n    pass\n"
        verdict, errors = check(f"{head}\n{code}\n", self._problem.check)
        if verdict == "passed":
            return Step(observation="All tests passed.", reward=1.0, verdict=verdict)
        output = _cut(errors) or f"(no output; {verdict})"
        return Step(observation=f"The tests failed ({verdict}):\n{output}", verdict=verdict)


# Runs in the sandbox, on a new database in every turn. Long rows are cut here: cutting the output would break the JSON.
_SQL = """
import json, sqlite3
task = json.load(open('task.json'))
def rows(query):
    database = sqlite3.connect(':memory:')
    database.executescript(task['schema'])
    return [list(row) for row in database.execute(query).fetchmany(1000)]
expected = rows(task['solution'])
try:
    found = rows(task['query'])
except Exception as error:
    print(json.dumps({'error': str(error)[:1000]}))
else:
    key = (lambda r: r) if task['ordered'] else (lambda r: sorted(r, key=repr))
    rows = [str(row)[:1000] for row in found[:20]]
    print(json.dumps({'rows': rows, 'count': len(found), 'right': key(found) == key(expected)}))
"""


class SqlEnvironment(Environment):
    """A question to an SQLite database, solved by a query that returns the rows of the solution."""

    def __init__(self, id: str, schema: str, question: str, solution: str):
        self.id = id
        self._schema, self._question, self._solution = schema, question, solution

    def reset(self) -> str:
        return (
            "Answer the question with one SQLite query in a ```sql block. You see what it returns.\n\n"
            f"{self._schema}\nQuestion: {self._question}"
        )

    def step(self, action: str) -> Step:
        query = block(action, "sql", "sqlite").strip().rstrip(";")
        if not query:
            return EMPTY
        ordered = "order by" in self._solution.lower()
        task = {"schema": self._schema, "solution": self._solution, "query": query, "ordered": ordered}
        files = {"task.json": json.dumps(task), "main.py": _SQL}
        limits = dataclasses.replace(LIMITS, output_bytes=1 << 20)  # a letter may be 12 bytes of JSON
        result = run(["python", "-I", "-S", "main.py"], files=files, limits=limits)
        if result.code != 0:
            return Step(observation="The query did not finish.", verdict="time")
        reply = json.loads(result.output)
        if "error" in reply:
            error = reply["error"] or "out of memory"  # MemoryError has no text
            verdict = "syntax" if "syntax" in error else "name" if "no such" in error else "other error"
            return Step(observation=f"Error: {error}", verdict=verdict)
        text = _cut(f"{reply['count']} rows:\n" + "\n".join(reply["rows"]))
        if reply["right"]:
            return Step(observation=f"Right. {text}", reward=1.0, verdict="passed")
        return Step(observation=f"Not the answer. {text}", verdict="wrong answer")


class BashEnvironment(Environment):
    """A sandboxed shell whose files stay between turns, solved when a check script succeeds."""

    def __init__(self, id: str, task: str, files: Mapping[str, str], check: str):
        self.id = id
        self._task, self._files, self._check = task, dict(files), check
        self._box: pathlib.Path | None = None

    def reset(self) -> str:
        self.close()
        self._box = make_directory("bash-")
        for name, text in self._files.items():
            path = self._box / name
            path.write_text(text)
            path.chmod(0o666)  # the sandbox may run as another user
        return (
            "You have a Bash shell. Answer with commands in one ```bash block; you see their output."
            f" Files stay between turns.\n\nTask: {self._task}"
        )

    def step(self, action: str) -> Step:
        script = block(action, "bash", "sh", "shell")
        if not script.strip():
            return EMPTY
        assert self._box is not None, "reset comes first"
        result = run(["bash", "-c", script], directory=self._box, limits=LIMITS)
        output = _cut(result.output + result.errors) or "(no output)"
        if result.timed_out:
            return Step(observation=f"{output}\n(stopped: out of time)", verdict="time")
        # Checked in a separate run: no process that the agent started is left.
        if run(["bash", "-c", self._check], directory=self._box, limits=LIMITS).code == 0:
            return Step(observation=f"{output}\nThe task is solved.", reward=1.0, verdict="passed")
        verdict = "wrong answer" if result.code == 0 else "other error"
        if "command not found" in result.errors or "No such file" in result.errors:
            verdict = "name"
        elif "syntax error" in result.errors:
            verdict = "syntax"
        return Step(observation=f"{output}\n(exit code {result.code})", verdict=verdict)

    def close(self) -> None:
        if self._box is not None:
            remove_tree(self._box)
            self._box = None


SCHEMA = """CREATE TABLE author (id INTEGER PRIMARY KEY, name TEXT, country TEXT, born INTEGER);
CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT, author_id INTEGER, year INTEGER, pages INTEGER);
INSERT INTO author VALUES (1,'Ada','UK',1815),(2,'Grace','US',1906),(3,'Alan','UK',1912),(4,'Edsger','NL',1930);
INSERT INTO book VALUES (1,'Notes',1,1843,66),(2,'Flow',2,1952,120),(3,'Compilers',2,1955,310),
  (4,'Machines',3,1936,36),(5,'Minds',3,1950,28),(6,'Discipline',4,1976,217);"""

QUESTIONS = {
    "count": ("How many books are there?", "SELECT count(*) FROM book"),
    "filter": ("Titles of the books with more than 100 pages?", "SELECT title FROM book WHERE pages > 100"),
    "join": (
        "Titles of the books by authors from the UK?",
        "SELECT title FROM book JOIN author ON author.id = author_id WHERE country = 'UK'",
    ),
    "group": (
        "Each author's name with the number of books?",
        "SELECT name, count(*) FROM author JOIN book ON author.id = author_id GROUP BY name",
    ),
    "order": ("All titles, the newest first?", "SELECT title FROM book ORDER BY year DESC"),
}

CHORES = {
    "count": (
        "Write the number of lines of log.txt to count.txt.",
        {"log.txt": "a\nb\nc\nd\n"},
        '[ "$(tr -d " \\n" < count.txt)" = 4 ]',
    ),
    "rename": (
        "Rename every .txt file to .md.",
        {"a.txt": "1", "b.txt": "2"},
        '[ "$(ls)" = "$(printf "a.md\\nb.md")" ]',
    ),
    "errors": (
        "Copy the lines of log.txt that contain ERROR to errors.txt.",
        {"log.txt": "INFO x\nERROR y\nINFO z\nERROR w\n"},
        '[ "$(cat errors.txt)" = "$(printf "ERROR y\\nERROR w")" ]',
    ),
    "sum": (
        "Write the sum of the numbers in numbers.txt to sum.txt.",
        {"numbers.txt": "3\n14\n15\n"},
        '[ "$(tr -d " \\n" < sum.txt)" = 32 ]',
    ),
}


def sql_environments() -> list[SqlEnvironment]:
    return [SqlEnvironment(f"sql/{name}", SCHEMA, *asked) for name, asked in QUESTIONS.items()]


def bash_environments() -> list[BashEnvironment]:
    return [BashEnvironment(f"bash/{name}", *chore) for name, chore in CHORES.items()]
