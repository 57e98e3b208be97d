"""Our environments as a taskset of `verifiers`, and tasksets of the library as environments."""

import copy
import json
import sys

import pytest

from lemur_jax.agents.environments import NotScored
from lemur_jax.agents.episodes import open_environments
from lemur_jax.agents.runner import call_all
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.config import from_config_dict
from lemur_jax.rl import run
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.train.loop import train
from tests.helpers.endpoint import endpoint
from tests.helpers.rl import STEPS, make_config
from tests.helpers.verifiers import TASKSET


@pytest.fixture
def model():
    """The URL of one that knows 6 and, when asked again, the query that counts books; and what it was asked."""
    asked = []

    def answer(body):
        asked.append(body)
        return "6" if len(body["messages"]) < 3 else "SELECT count(*) FROM book"

    with endpoint(answer) as url:
        yield url, asked


@pytest.fixture
def taskset(tmp_path, monkeypatch):
    """Makes a taskset, and returns its tasks by name: `TASKSET` with one text replaced by another."""
    pytest.importorskip("verifiers.v1", reason="verifiers is not installed: pip install '.[verifiers]'")
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, old="", new=""):
        assert old in TASKSET
        (tmp_path / f"lemur_test_{name}.py").write_text(TASKSET.replace(old, new) if old else TASKSET)
        return {task.id: task for task in open_environments([f"verifiers:lemur-test-{name}"])}

    return make


def test_tasksets_both_ways(taskset, model, tmp_path, monkeypatch, caplog):
    (url, asked), output = model, tmp_path / "agents.json"
    taskset("sums")
    taskset("broken", "return float(", "assert self.data.answer == '2', 'no judge'\n        return float(")

    def play(name, *words):
        asked.clear()
        words = [*words, "--endpoint", url, "--endpoint-model", "m", "--json", str(output), "--turns", "1"]
        assert main(["eval", "--agents", f"verifiers:{name}", *words]) == 0
        return json.loads(output.read_text())["agents"]["traces"]

    first, second = play("lemur-test-sums")
    assert [first["solved_at"], second["solved_at"]] == [None, 1]
    assert second["task"] == "Add.\n5 + 1?"
    assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]
    assert play("lemur-test-sums", "--skip", "1") == [second]
    # --turns is not for a taskset, which ends its episodes.
    count, other = play("lemur-verifiers", "--limit", "2")
    assert (count["id"], count["solved_at"], other["solved_at"]) == ("lemur-verifiers/sql/count", 2, None)
    assert count["turns"][0]["step"]["observation"].startswith("Error: ")
    assert len(other["turns"]) == 5
    # A killed evaluation goes on.
    with monkeypatch.context() as patch:
        patch.setattr("lemur_jax.cli.evaluation._write_agents", lambda *_: sys.exit(143))
        with pytest.raises(SystemExit):
            play("lemur-test-sums")
    assert len(asked) == 2
    assert play("lemur-test-sums") == [first, second]
    assert not asked
    # One episode with an error is named, and the others count.
    (only,) = play("lemur-test-broken")
    assert only["id"] == first["id"].replace("sums", "broken")
    assert "not scored: 1 of 2 tasks" in caplog.messages
    assert "no judge" in caplog.text


def test_copies_of_a_task_are_played_together_and_one_is_left(taskset):
    first, second = taskset("sums").values()
    played = [copy.copy(task) for task in (first, first, second)]
    assert [one.reset() for one in played] == ["Add.\n1 + 1?", "Add.\n1 + 1?", "Add.\n5 + 1?"]
    played[2].close()
    steps = [one.step(answer) for one, answer in zip(played, ("2", "7"), strict=False)]
    assert [(step.reward, step.done) for step in steps] == [(1, True), (0, True)]
    # Turns of one of ours, as `lemur rl` plays a group.
    (task,) = open_environments(["verifiers:lemur-verifiers"], 1)
    played = [copy.copy(task) for _ in range(2)]
    assert all("book" in text for text in call_all([one.reset for one in played], 60))
    step = played[0].step("6")
    assert step.observation.startswith("Error: ")
    assert not step.done
    assert [one.step("SELECT count(*) FROM book").reward for one in played] == [1, 1]


def test_tasks_may_have_one_name(taskset):
    found = taskset("named", "data = Data(", "data = Data(name='sum', ")
    assert list(found) == ["lemur-test-named/sum", "lemur-test-named/sum-1"]
    assert len({task.reset() for task in found.values()}) == 2
    for task in found.values():
        task.close()


def test_a_taskset_that_cannot_be_played_is_named(taskset):
    broken = "async def setup(self, trace, runtime):\n        assert False, 'no tools'\n\n    @vf.reward"
    task, _ = taskset("silent", "@vf.reward", broken).values()
    with pytest.raises(NotScored, match="lemur-test-silent/0: .*no tools"):
        task.reset()
    with pytest.raises(UserError, match="the taskset 'lemur-nowhere' of verifiers cannot be loaded"):
        open_environments(["verifiers:lemur-nowhere"])
    with pytest.raises(UserError, match="is infinite: lemur eval needs a --limit"):
        taskset("endless", "TasksetConfig]):", "TasksetConfig]):\n    INFINITE = True\n")
    assert len(open_environments(["verifiers:lemur-test-endless"], 1, skip=1)) == 1


def test_without_the_library_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    monkeypatch.delitem(sys.modules, "lemur_jax.agents.tasksets", raising=False)
    pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")
    assert main(["eval", "--endpoint", "http://x", "--agents", "verifiers:gsm8k"]) == 2
    assert "pip install 'lemur_jax[verifiers]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run(taskset, small_chat_tokenizer, tmp_path):
    """`lemur rl` on a taskset that rewards long answers."""
    taskset("lengths", "float(self.data.answer in trace.last_reply)", "min(len(trace.last_reply), 9) / 10")
    config = make_config(small_chat_tokenizer, tmp_path, environment="verifiers:lemur-test-lengths")
    train(from_config_dict(config), tmp_path / "run", open_inputs=run.open_inputs)
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert len(records) == STEPS
    for record in records:
        assert record["episodes/failed"] == 0
        assert 0 < record["reward"] < 1
        assert record["grad_norm"] > 0
        assert record["logprob_gap"] < 1e-4
