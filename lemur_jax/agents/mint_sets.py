"""Opens MINT's sets: tasks, the prompts of a recorded run, and the tools that its tasks name."""

import sys
from collections.abc import Callable, Mapping, Sequence

from lemur_jax.agents import mint
from lemur_jax.agents.alfworld import alfworld_environments
from lemur_jax.agents.environments import find_data
from lemur_jax.agents.shell import interpreter
from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import Message


def open_mint(
    data: str,
    only: Sequence[str],
    extra: Mapping[str, list[mint.Recorded]] | None = None,
    expert: Callable[[Sequence[Message]], str] | None = None,
    python: str = sys.executable,
) -> list[mint.MintEnvironment]:
    """The environments of the sets.

    Args:
      extra: a run whose prompts and searches take precedence (Wikipedia changes).
      expert: writes feedback; the examples then show some.
      python: the interpreter that runs the cells.

    Raises:
      UserError: data are missing or of another version, or the interpreter lacks IPython.
    """
    root = find_data(data, "processed/gsm8k/test_prompts.json", mint.WHERE)
    interpreter(python)  # a wrong one fails before the first episode
    runs = [run for episodes in (extra or {}).values() for run in episodes]
    outputs = root / "outputs"
    # The example of a run with feedback shows it.
    paths = sorted(outputs.glob("*/F=*" if expert else "*/F=None"), key=lambda path: path.name == "F=None")
    for path in paths:
        runs += [run for episodes in mint.recorded_run(path, only).values() for run in episodes]
    if not runs:
        raise UserError(f"--data {data} has no outputs/MODEL/F=None of MINT (the prompts): {mint.WHERE}")
    openings = {run.id: run.opening for run in reversed(runs)}
    searches = mint.recorded_searches(runs)
    functions = {"wikipedia_search(query)": lambda query: searches.get(query, mint.NOT_FOUND)}
    environments: list[mint.MintEnvironment] = []
    for name in only or mint.SETS:
        if name == "alfworld":
            environments += alfworld_environments(root, openings, python)
        else:
            tools = {} if name in mint.CODE else functions
            tasks = mint.load_tasks(root, name, openings)
            environments += [mint.MintEnvironment(task, tools, python) for task in tasks]
    for environment in environments:
        environment.expert = expert
    return environments
