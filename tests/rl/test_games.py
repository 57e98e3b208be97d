"""The calculator, and how `lemur rl` opens environments."""

import contextlib
import gc
import itertools

import pytest

from lemur_jax.agents import episodes, intercode
from lemur_jax.common.errors import UserError
from lemur_jax.rl import games
from lemur_jax.rl.config import RlConfig


@pytest.mark.parametrize(
    ("action", "observation", "reward", "done"),
    [
        ("answer: 42", "right", 1, True),
        (" answer:42 ", "right", 1, True),
        ("answer: -42", "wrong", 0, True),
        ("calc: 12 + 30", "42", 0, False),
        *(
            (text, "calc: EXPRESSION, or answer: NUMBER", 0, False)
            for text in ("answer: 12 + 30", "42", "calc: x")
        ),
    ],
)
def test_the_calculator_pays_for_the_number_alone(action, observation, reward, done):
    step = games.Calculator("12 + 30").step(action)
    assert (step.observation, step.reward, step.done) == (observation, reward, done)


def test_the_database_server_lives_until_the_process_ends(tmp_path, monkeypatch):
    running, at_exit = [], []

    @contextlib.contextmanager
    def server(dump):
        running.append(dump)
        yield tmp_path / "socket"
        running.remove(dump)

    monkeypatch.setattr(intercode, "server", server)
    monkeypatch.setattr(episodes.atexit, "register", at_exit.append)
    files = tmp_path / "sql" / "spider"
    files.mkdir(parents=True)
    task = '{"db": "", "db_tables": {}, "query": "", "gold": "SELECT 1"}'
    (files / "ic_spider_dev.json").write_text(f"[{task}, {task}]")
    (files / "ic_spider_dbs.sql").write_text("")
    train, held_out = games.tasks("intercode-sql", str(tmp_path))
    gc.collect()
    assert (len(train), len(held_out), len(running)) == (1, 1, 1)
    assert train[0].content["gold"] == "SELECT 1"  # with which a run goes on
    at_exit.pop()()
    assert not running


def test_the_longest_episode_is_known_without_its_environment():
    fixed = {"lamp": 3, "mint-gsm8k": 5, "intercode-sql": 10, "intercode-bash": 10}
    for name, turns in (fixed | {"sql": 7}).items():
        assert games.longest_episode(RlConfig(environment=name, max_turns=7)) == turns
    assert max(one.max_turns for one in itertools.chain(*games.tasks("lamp"))) == 3


def test_an_unknown_environment_is_told_of_all():
    with pytest.raises(UserError, match="'': there are python, .* verifiers:TASKSET, .* lamp and calculator"):
        games.tasks("")
