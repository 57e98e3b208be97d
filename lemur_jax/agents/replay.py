"""Recorded turns instead of a model: whether the environments give the same observations and verdicts."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

from lemur_jax.agents import intercode, mint
from lemur_jax.agents.environments import Environment, NotScored
from lemur_jax.agents.episodes import Trace, Turn, open_environments
from lemur_jax.agents.mint import Recorded
from lemur_jax.agents.mint_sets import open_mint
from lemur_jax.common.cores import available_cores
from lemur_jax.common.errors import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed:
    """A replayed episode beside its recording.

    Attributes:
      trace: ours.
      success: the recorded verdict.
      compared: turns with a recorded observation.
      different: (likely cause, recorded, ours) of the observations that differ.
    """

    trace: Trace
    success: bool
    compared: int
    different: Sequence[tuple[str, str, str]]

    @property
    def same_verdict(self) -> bool:
        return self.success == (self.trace.solved_at is not None)


def replay(environments: Iterable[Environment], recorded: Iterable[Recorded]) -> list[Replayed]:
    """Replays every recorded episode for which there is an environment, as many at once as there are processors.

    Tasks that cannot run here are named in a warning and left out.
    """
    by_id = {environment.id.removeprefix("mint-"): environment for environment in environments}
    pairs = [(by_id[episode.id], episode) for episode in recorded if episode.id in by_id]
    with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
        return [found for found in pool.map(lambda pair: _replay(*pair), pairs) if found]


def replay_run(
    names: Sequence[str],
    data: str,
    path: str,
    limit: int | None,
    stack: contextlib.ExitStack,
    python: str = sys.executable,
) -> dict[str, list[Replayed]]:
    """Replays a recorded run by kind of environment.

    Args:
      names: "mint", "mint-SET", "intercode-sql" or "intercode-bash".
      path: a file or directory of MINT's outputs, or a file of InterCode's results.
      limit: of each kind.
      stack: keeps InterCode's database server.
      python: the interpreter that runs MINT's cells.

    Raises:
      UserError: data are missing, or the recorded run is of another protocol.
    """
    if names in (["intercode-sql"], ["intercode-bash"]):
        kind = names[0].removeprefix("intercode-")
        recorded = {names[0]: intercode.recorded_run(pathlib.Path(path), kind)}
        opened: Sequence[Environment] = open_environments(names, data=data, stack=stack)
    elif all(name == "mint" or name.removeprefix("mint-") in mint.SETS for name in names):
        only = [] if "mint" in names else [name.removeprefix("mint-") for name in names]
        runs = mint.recorded_run(pathlib.Path(path), only)
        opened = open_mint(data, list(runs), runs, python=python)
        recorded = {f"mint-{name}": run for name, run in runs.items()}
    else:
        raise UserError(
            "--replay needs --agents mint, sets mint-SET, intercode-sql alone, or intercode-bash alone, not "
            + ",".join(names)
        )
    return {name: replay(opened, run[:limit]) for name, run in recorded.items()}


def _replay(environment: Environment, episode: Recorded) -> Replayed | None:
    try:
        task, turns, different, compared = environment.reset(), [], [], 0
        for action, seen in episode.turns:
            step = environment.step(action)
            if seen is not None:
                compared += 1
                theirs, mark, feedback = seen.partition(mint.FEEDBACK)
                ours, theirs = step.observation.rstrip("\n"), theirs.rstrip("\n")
                if _without_paths(ours) != _without_paths(theirs):
                    different.append((_cause(theirs, ours), theirs, ours))
                step = dataclasses.replace(step, observation=step.observation + mark + feedback)
            turns.append(Turn(action=action, step=step))
            if step.done or step.reward >= 1:
                break
        trace = Trace(id=environment.id, task=task, turns=tuple(turns))
        return Replayed(trace=trace, success=episode.success, compared=compared, different=different)
    except NotScored as why:
        logger.warning("not scored: %s", why)
        return None
    finally:
        environment.close()


def _without_paths(text: str) -> str:
    """A text without the directories in which packages and the shell are installed."""
    return re.sub(r"<hidden_filepath>:\S*", "<hidden_filepath>", re.sub(r"/[^\s()]*-packages/", "", text))


# Why two observations differ, most likely: the first that is found in both texts, with a NUL between them.
_CAUSES = {
    "(Syntax|Indentation)Error": "wording of Python's syntax errors",
    "TimeoutError": "time-out",
    "Page: |[Ww]ikipedia": "live search",
    " at 0x": "addresses",
    "(site|dist)-packages": "traceback inside a library",
    "Error.*\0.*Error": "wording of errors",
    "Error": "an error in one only: library versions",
}


def _cause(theirs: str, ours: str) -> str:
    for mark, cause in _CAUSES.items():
        if re.search(mark, f"{theirs}\0{ours}", re.DOTALL):
            return cause
    same = re.sub(r"[\d.e+-]+", "0", theirs) == re.sub(r"[\d.e+-]+", "0", ours)
    return "numbers: random or last digits" if same else "other text: library versions, order of sets"


def format_replay(name: str, episodes: Sequence[Replayed]) -> str:
    """One line of counts, then what differs."""
    same, total = sum(one.same_verdict for one in episodes), len(episodes)
    compared = sum(one.compared for one in episodes)
    causes = collections.Counter(cause for one in episodes for cause, _, _ in one.different)
    equal = compared - sum(causes.values())
    lines = [
        f"{name}: verdicts equal {same}/{total} ({100 * same / max(1, total):.2f}%),"
        f" observations equal {equal}/{compared} ({100 * equal / max(1, compared):.2f}%)"
    ]
    lines += [f"  {count} differ, most likely: {cause}" for cause, count in causes.most_common()]
    lines += [f"  verdict differs: {one.trace.id}" for one in episodes if not one.same_verdict]
    return "\n".join(lines)
