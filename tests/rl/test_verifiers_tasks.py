"""Tasksets of the `verifiers` library, which the policy answers turn by turn."""

import copy

import pytest

from lemur_jax.agents.runner import call_all
from lemur_jax.common.errors import UserError
from lemur_jax.config import from_config_dict
from lemur_jax.rl import games, run
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.train.loop import train
from tests.helpers.rl import STEPS, make_config
from tests.helpers.verifiers import TASKSET


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    pytest.importorskip("verifiers.v1", reason="verifiers is not installed: pip install '.[verifiers]'")
    (tmp_path / "lemur_test_sums.py").write_text(TASKSET)
    monkeypatch.syspath_prepend(tmp_path)

    def named(name):
        train, held_out = games.tasks(f"verifiers:{name}")
        return {task.id: task for task in (*train, *held_out)}

    return named


def test_episodes_of_a_taskset(tasks):
    """Two copies of a task at a time, and one that is left."""
    found = tasks("lemur-test-sums")
    assert len(found) == 2
    first, second = found.values()
    played = [copy.copy(task) for task in (first, first, second)]
    asked = [episode.reset() for episode in played]
    assert asked[0] == asked[1] != asked[2]
    assert {asked[0], asked[2]} == {"Add.\n1 + 1?", "Add.\n5 + 1?"}
    right = "2" if "1 + 1" in asked[0] else "6"
    played[2].close()
    steps = [episode.step(answer) for episode, answer in zip(played, (right, "7"), strict=False)]
    assert [step.reward for step in steps] == [1, 0]
    assert all(step.done for step in steps)


def test_tasks_may_have_one_name(tasks, tmp_path):
    named = TASKSET.replace("data = Data(", "data = Data(name='sum', ")
    assert named != TASKSET
    (tmp_path / "lemur_test_named.py").write_text(named)
    found = tasks("lemur-test-named")
    assert sorted(found) == ["lemur-test-named/sum", "lemur-test-named/sum-1"]
    assert len({task.reset() for task in found.values()}) == 2
    for task in found.values():
        task.close()


def test_several_turns_of_a_group(tasks):
    """Both episodes of one task of ours are played at the same time."""
    task = tasks("lemur-verifiers")["lemur-verifiers/sql/count"]
    episodes = [copy.copy(task) for _ in range(2)]
    assert all("book" in text for text in call_all([episode.reset for episode in episodes], 60))
    step = episodes[0].step("6")
    assert step.observation.startswith("Error: ")
    assert not step.done
    assert [episode.step("SELECT count(*) FROM book").reward for episode in episodes] == [1, 1]


@pytest.mark.slow
def test_a_run(tasks, small_chat_tokenizer, tmp_path):
    """`lemur rl` on a taskset that rewards long answers."""
    reward = "float(self.data.answer in trace.last_reply)"
    assert reward in TASKSET
    longer = TASKSET.replace(reward, "min(len(trace.last_reply), 9) / 10")
    (tmp_path / "lemur_test_lengths.py").write_text(longer)
    config = make_config(small_chat_tokenizer, tmp_path, environment="verifiers:lemur-test-lengths")
    train(from_config_dict(config), tmp_path / "run", open_inputs=run.open_inputs)
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert len(records) == STEPS
    for record in records:
        assert record["episodes/failed"] == 0
        assert 0 < record["reward"] < 1
        assert record["grad_norm"] > 0
        assert record["logprob_gap"] < 1e-4


def test_names_of_no_taskset(tasks):
    with pytest.raises(UserError, match="the taskset 'lemur-nowhere' of verifiers cannot be loaded"):
        tasks("lemur-nowhere")
