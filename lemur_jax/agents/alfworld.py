"""ALFWorld's games as MINT plays them: functions of the Python shell are actions of the game."""

import functools
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from lemur_jax.agents.mint import MintEnvironment, Task
from lemur_jax.common.errors import UserError

_SCRIPT = pathlib.Path(__file__).with_name("alfworld_process.py")
MAX_ACTIONS = 50  # in a game
_COMMANDS = {
    "put(object, receptacle)": "put {} in/on {}",
    "goto(receptacle)": "go to {}",
    "take_from(object, receptacle)": "take {} from {}",
    "open_receptacle(receptacle)": "open {}",
    "toggle(object_or_receptacle)": "toggle {}",
    "close_receptacle(receptacle)": "close {}",
    "clean(object, receptacle)": "clean {} with {}",
    "heat(object, receptacle)": "heat {} with {}",
    "cool(object, receptacle)": "cool {} with {}",
    "use(receptacle)": "use {}",
    "look()": "look",
}


class AlfworldEnvironment(MintEnvironment):
    """A household task, solved when the game is won or, as in MINT, when it ends after MAX_ACTIONS.

    Args:
      game: its `game.tw-pddl`.
    """

    def __init__(self, task: Task, game: pathlib.Path, python: str = sys.executable):
        super().__init__(task, {}, python)
        self._game = game
        self._process: Any = None  # a Popen with both pipes, while a game runs
        self._won, self._actions = False, 0

    def reset(self) -> str:
        self.close()
        # Bound to this copy: `lemur rl` copies a task for each episode.
        self._functions = {name: functools.partial(self._play, text) for name, text in _COMMANDS.items()}
        self._won, self._actions = False, 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), str(self._game)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()  # starting a game does not count as a cell's time
        return super().reset()

    def _play(self, command: str, *arguments: str) -> str:
        self._process.stdin.write(json.dumps(command.format(*arguments)) + "\n")
        self._process.stdin.flush()
        feedback, won = self._read()
        self._actions += 1
        self._won = self._won or won or self._actions >= MAX_ACTIONS
        return re.sub(r"^You arrive at loc .*?\. ", "", feedback)

    def _read(self) -> tuple[str, bool]:
        if not (line := self._process.stdout.readline()):
            raise UserError(f"the game {self._game} has ended: see its messages above")
        return tuple(json.loads(line))

    def act(self, action: str) -> tuple[str, str]:
        observation, verdict = super().act(action)
        return observation, "passed" if self._won else verdict

    def solved(self, answer: str) -> bool:
        return self._won

    def close(self) -> None:
        super().close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def alfworld_environments(
    data: pathlib.Path, openings: Mapping[str, str], python: str = sys.executable
) -> list[AlfworldEnvironment]:
    """The 134 games of the split "unseen" that the recorded runs play.

    Raises:
      UserError: the library or a game is missing.
    """
    if importlib.util.find_spec("alfworld") is None:
        raise UserError(
            "ALFWorld's games need its library: pip install 'lemur_jax[alfworld]' (minutes, it compiles)"
        )
    root = data / "processed" / "alfworld" / "json_2.1.1" / "valid_unseen"
    environments = []
    for id, opening in openings.items():
        if not id.startswith("alfworld/"):
            continue
        game = root / id.removeprefix("alfworld/") / "game.tw-pddl"
        if not game.exists():
            raise UserError(f"{game} is missing: get ALFWorld's games (https://github.com/alfworld/alfworld)")
        task = Task(id=id, opening=opening, solved=lambda answer: False)
        environments.append(AlfworldEnvironment(task, game, python))
    return environments
