"""MINT (Wang et al. 2023): five turns with a Python shell, two proposals, as the paper's Tables 4, 5 and 7 use it."""

import ast
import dataclasses
import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lemur_jax.agents import mint_checks
from lemur_jax.agents.environments import Environment, Step
from lemur_jax.agents.shell import Shell
from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import Message

MAX_STEPS, MAX_PROPOSALS = 5, 2
PROTOCOL = "max5_p2+tool+cd"
_TITLES = ("GSM8K", "MATH", "TheoremQA", "HotpotQA", "MMLU", "HumanEval", "MBPP", "ALFWorld")
SETS = {title.lower(): title for title in _TITLES}  # with the paper's names
CODE = ("humaneval", "mbpp")
INVALID = (
    "I don't understand your input. \n"
    "If you want to execute code, please use <execute> YOUR_CODE_HERE </execute>.\n"
    "If you want to give me an answer, please use <solution> YOUR_SOLUTION_HERE </solution>.\n"
    "For example: The answer to the question is <solution> 42 </solution>. \n"
)
FEEDBACK = "\nExpert feedback:\n"
# MINT cuts an answer at these, where it continues with turns of the environment.
STOPS = ("\nObservation:", "\nExpert feedback:", "\nTask:", "\n---", "\nHuman:")
# The expert's instructions, before example, task and turns; those of the recorded runs are not in their data.
_EXPERT = (
    "You review the work of an assistant. Say whether its last step is GOOD or BAD and why, in a few sentences that"
    " help it to go on. Write no code and do not give the answer away. Follow the expert of the example if there is"
    " one.\n\n---\n"
)
SEARCH_CHARACTERS = 1000
NOT_FOUND = "Wikipedia Search Result was found"  # the tool's wording when nothing was
WHERE = "get data/ of https://github.com/xingyaoww/mint-bench"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task of MINT.

    Attributes:
      opening: the first message: protocol, tools, an example and the question.
      solved: answer -> whether it is right; ALFWorld's game decides itself.
      row: its record in the file of its set, with the reference.
    """

    id: str
    opening: str
    solved: Callable[[str], bool]
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """An episode of a recorded run.

    Attributes:
      turns: (action, observation after it or None).
    """

    id: str
    opening: str
    turns: Sequence[tuple[str, str | None]]
    success: bool


def recorded_run(directory: pathlib.Path, only: Sequence[str] = ()) -> dict[str, list[Recorded]]:
    """The recorded episodes of one model by set.

    Args:
      directory: holds `GROUP/SET/results.jsonl`, in or below it; or one such file.

    Raises:
      UserError: there are none, one is damaged, they follow another protocol, or there are runs of several models.
    """
    episodes: dict[str, list[Recorded]] = {}
    directory = directory.absolute()  # names of its parents count too
    paths = [directory] if directory.is_file() else sorted(directory.glob("**/results.jsonl"))
    for path in paths:
        name = path.parent.name
        if name not in SETS or (only and name not in only):
            continue
        if PROTOCOL not in path.parts:
            raise UserError(f"{path} is not a run of the protocol {PROTOCOL}")
        if name in episodes:
            raise UserError(f"{directory} holds several runs of {name}: name the directory of one")
        episodes[name] = _read_lines(path, "an episode", functools.partial(_recorded, name))
    if not episodes:
        raise UserError(f"{directory} holds no results.jsonl of MINT ({', '.join(only or SETS)})")
    return episodes


def _read_lines(path: pathlib.Path, what: str, parse: Callable[[Any], Any]) -> list[Any]:
    """What `parse` makes of each line; UserError where one is not `what`."""
    try:
        return [parse(json.loads(line)) for line in path.open("rb")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"a line of {path} is not {what} of MINT ({error!r}): {WHERE}") from error


def _recorded(name: str, row: Mapping[str, Any]) -> Recorded:
    state = row["state"]
    opening, *rest = state["history"]
    turns: list[tuple[str, str | None]] = []
    for message in rest:
        if message["role"] == "assistant":
            action = re.sub(r"\A\s*Assistant:\n?", "", message["content"])  # see `as_turn`
            turns.append((action.removesuffix("\n"), None))
        elif turns and turns[-1][1] is None:
            turns[-1] = (turns[-1][0], message["content"])
        else:  # an empty action is not recorded
            turns.append(("", message["content"]))
    failed = state["terminate_reason"] == "error"  # of the model, e.g. its context was full
    if failed and turns and turns[-1][1] and turns[-1][1].startswith("Observation:\nAn error occurred."):
        turns.pop()
    id = f"{name}/{row['task']['task_id']}"
    return Recorded(id=id, opening=opening["content"], turns=turns, success=state["success"])


def load_tasks(data: pathlib.Path, name: str, openings: Mapping[str, str]) -> list[Task]:
    """The tasks of a set other than ALFWorld; `openings` by id come from a recorded run, which holds the examples."""
    path = data / "processed" / name / "test_prompts.json"
    if not path.exists():
        raise UserError(f"{path} is missing: {WHERE}")

    def task(row: Mapping[str, Any]) -> Task:
        id, solved = f"{name}/{row['id']}", _checker(name, row)
        if id not in openings:
            raise UserError(f"{path} has task {id}, the recorded runs have not: another version of the set")
        return Task(id=id, opening=openings[id], solved=solved, row=row)

    return _read_lines(path, "a task", task)


def _checker(name: str, row: Mapping[str, Any]) -> Callable[[str], bool]:
    reference = row["reference"]
    if name in CODE:
        return functools.partial(mint_checks.code, reference)
    if name == "mmlu":
        return functools.partial(mint_checks.choice, reference, prompt=row["prompt"])
    if name == "theoremqa":
        return functools.partial(mint_checks.theorem, reference, kind=row["answer_type"])
    return functools.partial(mint_checks.reasoning, reference)


def recorded_searches(runs: Iterable[Recorded]) -> dict[str, str]:
    """The first answer of `wikipedia_search` to each query, from cells that print nothing but its answers."""
    answers: dict[str, str] = {}
    complete: set[str] = set()
    for run in runs:
        for action, observation in run.turns:
            cell = "\n".join(tagged(action, "execute"))
            queries = _queries(cell)
            if observation is None or cell.count("wikipedia_search(") != len(queries):
                continue
            text = observation.removeprefix("Observation:\n").rpartition("\nYou have ")[0]
            if match := re.fullmatch(r"Out\[\d+\]: (['\"].*['\"])", text):
                text = ast.literal_eval(match[1])
            for query in queries:
                if not text.startswith(("Page: ", NOT_FOUND)):
                    break
                # An answer has at most 1000 characters; the end of a shorter one cannot be recognized.
                full = len(text) > SEARCH_CHARACTERS and text[SEARCH_CHARACTERS] == "\n"
                if not full and query != queries[-1]:
                    break
                answer = text[:SEARCH_CHARACTERS] if full else text
                if query not in complete and (full or query not in answers):
                    answers[query] = answer
                if full:
                    complete.add(query)
                text = text[len(answer) + 1 :]
    return answers


def _queries(cell: str) -> list[str]:
    """The literal queries of a cell's searches."""
    pattern = r"""wikipedia_search\(\s*(?:query\s*=\s*)?((['"])(?:\\.|(?!\2).)*\2)\s*\)"""
    return [ast.literal_eval(text) for text, _ in re.findall(pattern, cell)]


def tagged(action: str, tag: str) -> list[str]:
    """The texts between <tag> and </tag>."""
    return [text.strip() for text in re.findall(f"<{tag}>(.*?)</{tag}>", action, re.DOTALL)]


class MintEnvironment(Environment):
    """An episode: the model runs code or proposes an answer.

    Args:
      functions: tools that the cells can call.
      python: the interpreter that runs the cells.

    Attributes:
      expert: comments on every turn but the last (Table 6); conversation -> text, like an agent.
    """

    max_turns = MAX_STEPS
    stops = STOPS
    expert: Callable[[Sequence[Message]], str] | None = None

    def __init__(self, task: Task, functions: Mapping[str, Callable[..., str]], python: str = sys.executable):
        self.id, self.content = f"mint-{task.id}", [task.opening, task.row]
        self._task = task
        self._functions, self._python = functions, python
        self._shell: Shell | None = None
        self._said = ""
        self._steps = self._proposals = 0

    def reset(self) -> str:
        self._steps = self._proposals = 0
        MintEnvironment.close(self)  # only the shell: ALFWorld has started its game
        self._shell = Shell(self._functions, self._python)  # made here, so that a copy has its own
        # Without the instructions, which are the assistant's.
        self._said = self._task.opening.partition("---\n")[2] or self._task.opening
        return self._task.opening

    def as_turn(self, action: str) -> str:
        start = "" if action.lstrip().startswith("Assistant:") else "Assistant:\n"
        return f"{start}{action}\n"

    def step(self, action: str) -> Step:
        self._steps += 1
        observation, verdict = self.act(action)
        steps_left, proposals = MAX_STEPS - self._steps, MAX_PROPOSALS - self._proposals
        text = f"Observation:\n{observation}\n"
        text += f"You have {steps_left} steps left and {proposals} chances to propose solution left.\n"
        if steps_left <= 1:
            text += "You should take the last step to propose a solution.\n"
        if verdict == "passed":
            return Step(observation=text, verdict=verdict, reward=1.0)
        ended = not (steps_left and proposals)
        if self.expert is not None and not ended:
            self._said += f"\n{self.as_turn(action)}\n{text}{FEEDBACK}"
            comment = self.expert([{"role": "user", "content": _EXPERT + self._said}]) + "\n"
            self._said += comment
            text += FEEDBACK + comment
        return Step(observation=text, verdict=verdict, done=ended)

    def act(self, action: str) -> tuple[str, str]:
        """(observation, verdict) of an action."""
        if "<solution>" in action:  # one without an end is a proposal that MINT does not understand
            self._proposals += 1
            if not (answer := "\n".join(tagged(action, "solution"))):
                return INVALID, "invalid action"
            if self.solved(answer):
                return "Your answer is correct.", "passed"
            return "Your answer is wrong.", "wrong answer"
        if not (cell := "\n".join(tagged(action, "execute"))):
            return INVALID, "invalid action"
        assert self._shell is not None, "reset comes first"
        output = self._shell.run_cell(cell).strip()
        error = re.search(r"^\w*(Error|Exception|Interrupt)\b", output, re.MULTILINE)
        return output, "execution error" if error else "unfinished"

    def solved(self, answer: str) -> bool:
        return self._task.solved(answer)

    def close(self) -> None:
        if self._shell is not None:
            self._shell.close()
            self._shell = None
