"""Replays recorded turns, to test whether the environments give the same observations and verdicts."""

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
    """Replays every recorded episode for which there is an environment, in parallel on all processors.

    Tasks that cannot run here are named in a warning and left out.
    """
    by_id = {environment.id.removeprefix("mint-"): environment for environment in environments}
    pairs = [(by_id[episode.id], episode) for episode in recorded if episode.id in by_id]
    with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
        return [result for result in pool.map(lambda pair: _replay(*pair), pairs) if result]


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
        environments: Sequence[Environment] = open_environments(names, data=data, stack=stack)
    elif all(name == "mint" or name.removeprefix("mint-") in mint.SETS for name in names):
        sets = [] if "mint" in names else [name.removeprefix("mint-") for name in names]
        runs = mint.recorded_run(pathlib.Path(path), sets)
        environments = open_mint(data, list(runs), runs, python=python)
        recorded = {f"mint-{name}": run for name, run in runs.items()}
    else:
        raise UserError(
            "--replay needs --agents mint, sets mint-SET, intercode-sql alone, or intercode-bash alone, not "
            + ",".join(names)
        )
    return {name: replay(environments, run[:limit]) for name, run in recorded.items()}


def _replay(environment: Environment, episode: Recorded) -> Replayed | None:
    try:
        task, turns, different, compared = environment.reset(), [], [], 0
        for action, observation in episode.turns:
            step = environment.step(action)
            if observation is not None:
                compared += 1
                recorded, marker, feedback = observation.partition(mint.FEEDBACK)
                replayed, recorded = step.observation.rstrip("\n"), recorded.rstrip("\n")
                if _without_paths(replayed) != _without_paths(recorded):
                    different.append((_cause(recorded, replayed), recorded, replayed))
                step = dataclasses.replace(step, observation=step.observation + marker + feedback)
            turns.append(Turn(action=action, step=step))
            if step.done or step.reward >= 1:
                break
        trace = Trace(id=environment.id, task=task, turns=tuple(turns))
        return Replayed(trace=trace, success=episode.success, compared=compared, different=different)
    except NotScored as error:
        logger.warning("not scored: %s", error)
        return None
    finally:
        environment.close()


def _without_paths(text: str) -> str:
    """A text without the directories in which packages and the shell are installed."""
    return re.sub(r"<hidden_filepath>:\S*", "<hidden_filepath>", re.sub(r"/[^\s()]*-packages/", "", text))


# Why two observations differ, most likely: the first pattern found in the recorded text, a NUL and the replayed text.
_CAUSES = {
    "(Syntax|Indentation)Error": "wording of Python's syntax errors",
    "TimeoutError": "time-out",
    "Page: |[Ww]ikipedia": "live search",
    " at 0x": "addresses",
    "(site|dist)-packages": "traceback inside a library",
    "Error.*\0.*Error": "wording of errors",
    "Error": "an error in one only: library versions",
}


def _cause(recorded: str, replayed: str) -> str:
    for pattern, cause in _CAUSES.items():
        if re.search(pattern, f"{recorded}\0{replayed}", re.DOTALL):
            return cause
    same = re.sub(r"[\d.e+-]+", "0", recorded) == re.sub(r"[\d.e+-]+", "0", replayed)
    return "numbers: random or last digits" if same else "other text: library versions, order of sets"


def format_replay(name: str, episodes: Sequence[Replayed]) -> str:
    """One line of counts, then what differs."""
    same, total = sum(episode.same_verdict for episode in episodes), len(episodes)
    compared = sum(episode.compared for episode in episodes)
    causes = collections.Counter(cause for episode in episodes for cause, _, _ in episode.different)
    equal = compared - sum(causes.values())
    lines = [
        f"{name}: verdicts equal {same}/{total} ({100 * same / max(1, total):.2f}%),"
        f" observations equal {equal}/{compared} ({100 * equal / max(1, compared):.2f}%)"
    ]
    lines += [f"  {count} differ, most likely: {cause}" for cause, count in causes.most_common()]
    lines += [f"  verdict differs: {episode.trace.id}" for episode in episodes if not episode.same_verdict]
    return "\n".join(lines)
