"""Environments that a small model learns in minutes, and the tasks of any environment."""

import itertools
import random
from collections.abc import Sequence

from lemur_jax.agents import intercode, mint
from lemur_jax.agents.environments import Environment, Step
from lemur_jax.agents.episodes import open_environments
from lemur_jax.agents.mint_checks import evaluate
from lemur_jax.rl.config import RlConfig

SIDE, FARTHEST = 8, 3  # rooms along a side of the house, and moves of the longest path
MOVES = {"north": (0, -1), "south": (0, 1), "west": (-1, 0), "east": (1, 0)}
HELD_OUT = 5  # every fifth task is held out

Room = tuple[int, int]


class Lamp(Environment):
    """A text game: go through a square house to the lamp, whose light shows the direction, without a detour.

    The reward is 1 at the lamp, and 0.1 for a move towards it.
    """

    def __init__(self, start: Room, lamp: Room):
        self.id = f"lamp/{_name(start)}-{_name(lamp)}"
        self._start, self._lamp = start, lamp
        self.max_turns = sum(map(abs, self._way(start)))

    def reset(self) -> str:
        self._room = self._start
        return self._view()

    def _way(self, room: Room) -> Room:
        return self._lamp[0] - room[0], self._lamp[1] - room[1]

    def _view(self) -> str:
        x, y = self._way(self._room)
        light = ("east" if x > 0 else "west") if abs(x) > abs(y) else ("south" if y > 0 else "north")
        return f"room {_name(self._room)}, light from the {light}. Where to?"

    def step(self, action: str) -> Step:
        move = MOVES.get(action.strip().lower())
        if move is None:
            return Step(observation="north, south, west or east?", verdict="no move")
        offset, (x, y) = self._way(self._room), self._room
        self._room = min(max(x + move[0], 0), SIDE - 1), min(max(y + move[1], 0), SIDE - 1)
        if self._room == self._lamp:
            return Step(observation="lamp!", reward=1.0, verdict="passed")
        nearer = sum(map(abs, self._way(self._room))) < sum(map(abs, offset))
        return Step(observation=self._view(), reward=0.1 * nearer, verdict="wrong answer")


def _name(room: Room) -> str:
    return f"{'abcdefgh'[room[0]]}{room[1] + 1}"


class Calculator(Environment):
    """Arithmetic with a calculator as a tool: `calc: EXPRESSION` shows a value, `answer: NUMBER` ends the task."""

    def __init__(self, expression: str):
        self.id = f"calculator/{expression}"
        self._expression = expression

    def reset(self) -> str:
        return f"compute {self._expression} (calc: EXPRESSION, or answer: NUMBER)"

    def step(self, action: str) -> Step:
        command, _, text = action.strip().partition(":")
        value = calculate(text)
        is_number = text.strip().removeprefix("-").isdecimal()  # else the expression would be its own answer
        if value is None or not (command == "calc" or (command == "answer" and is_number)):
            return Step(observation="calc: EXPRESSION, or answer: NUMBER", verdict="no move")
        if command == "calc":
            return Step(observation=str(value), role="user", verdict="wrong answer")
        correct = value == calculate(self._expression)
        return Step(
            observation="right" if correct else "wrong",
            reward=float(correct),
            verdict="passed" if correct else "wrong answer",
            done=True,
        )


def calculate(text: str) -> int | None:
    """The value of an expression if it is a whole number, else None."""
    value = evaluate(text.strip()[:100])
    return value if type(value) is int else None


def longest_episode(options: RlConfig) -> int:
    """Turns of the longest episode: those that the environment fixes, else `max_turns`. Opens no environment."""
    fixed = {"lamp": FARTHEST, "intercode-sql": intercode.MAX_STEPS, "intercode-bash": intercode.MAX_STEPS}
    if options.environment.partition("-")[0] == "mint":
        return mint.MAX_STEPS
    return fixed.get(options.environment, options.max_turns)


def tasks(name: str, data: str = ".") -> tuple[Sequence[Environment], Sequence[Environment]]:
    """All tasks of an environment, for training and held out; each is copied for an episode.

    Raises:
      UserError: there is no such environment, or its data is missing.
    """
    if name == "lamp":
        rooms = list(itertools.product(range(SIDE), repeat=2))
        games = itertools.starmap(Lamp, itertools.permutations(rooms, 2))
        environments: list[Environment] = [game for game in games if game.max_turns <= FARTHEST]
    elif name == "calculator":
        rng = random.Random(0)
        environments = [
            Calculator(f"{rng.randrange(100)} {rng.choice('+-*')} {rng.randrange(100)}") for _ in range(1000)
        ]
    else:
        environments = list(open_environments([name], data=data))
    random.Random(0).shuffle(environments)
    unique = list({environment.id: environment for environment in environments}.values())
    return [environment for i, environment in enumerate(unique) if i % HELD_OUT], unique[::HELD_OUT]
