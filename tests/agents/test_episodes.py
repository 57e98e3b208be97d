"""Scripted agents through whole episodes, and our own model behind the command."""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import threading
import time
import types
import unittest.mock

import pytest

from lemur_jax.agents import environments, episodes
from lemur_jax.agents.environments import Step
from lemur_jax.agents.episodes import Trace, Turn, failure, paper_scores, success_by_turn, to_json
from lemur_jax.agents.mint import MintEnvironment
from lemur_jax.agents.runner import Journal, run_episodes
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.evals.published import format_agents
from lemur_jax.infer.generate import make_requests
from lemur_jax.infer.session import make_session
from lemur_jax.models.presets import preset
from tests.helpers.agents import run_episode, scripted
from tests.helpers.endpoint import endpoint
from tests.helpers.sessions import fresh_params, mesh_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture
def count():
    return environments.sql_environments()[0]


def test_an_episode_that_fails(count):
    trace = run_episode(count, scripted("SELECT 1", "SELECT 2"), max_turns=2)
    assert (trace.solved_at, failure(trace)) == (None, "wrong answer")
    assert failure(run_episode(count, scripted("SELECT 1", "SELECT 1"), max_turns=2)) == "repeated itself"
    assert failure(run_episode(count, scripted(""), max_turns=1)) == "no code"
    assert failure(Trace(id="", task="", turns=())) == "no answer"


def test_a_long_conversation_keeps_its_task(small_chat_tokenizer, monkeypatch):
    model = preset("tiny", vocab_size=small_chat_tokenizer.vocab_size)
    model = dataclasses.replace(model, max_position_embeddings=64)
    session = make_session(model, fresh_params(model), mesh_of(""), "float32", tokenizer=small_chat_tokenizer)
    seen = []

    def requests(prompts, *rest):
        seen.extend(small_chat_tokenizer.decode(prompt) for prompt in prompts)
        return make_requests(prompts, *rest)

    monkeypatch.setattr(episodes, "make_requests", requests)
    messages = [{"role": "user", "content": "the task"}]
    for number in range(6):
        messages.append({"role": "assistant", "content": f"do {number}"})
        messages.append({"role": "user", "content": f"saw {number}"})
    agent = episodes.SessionAgent(session, max_new_tokens=8)
    much = {"role": "user", "content": "rows " * 300 + "last row"}
    conversations = [messages, [{"role": "user", "content": "long " * 99 + "end"}], [*messages[:2], much]]
    found = agent.batch([(conversation, ()) for conversation in conversations])
    stop = found[0][1:3]  # of one conversation alone
    cut = agent.batch([(conversations[0], (stop,)), (conversations[1], ())])
    assert cut == [found[0].partition(stop)[0].strip(), found[1]]
    assert "the task" in seen[0]
    assert "saw 5" in seen[0]
    assert "do 0" not in seen[0]
    assert "end" in seen[1]
    assert "the task" in seen[2]
    assert "last row" in seen[2]


def test_success_by_turn(count):
    count.stops = MintEnvironment.stops
    agent = scripted("SELECT * FROM nowhere", "SELECT 6\nObservation:\n6", "never said")
    solved = run_episode(count, agent, max_turns=3)
    assert (solved.solved_at, failure(solved)) == (2, None)
    assert "no such table" in agent.seen[1][-1]["content"]
    assert [message["role"] for message in agent.seen[1]] == ["user", "assistant", "user"]
    failed = run_episode(count, scripted("x", "y", "z"), max_turns=3)
    assert success_by_turn([solved, failed], 3) == [0, 50, 50]
    shown = episodes.format_episodes([solved, failed], 3)
    assert "sql                   2      0.0     50.0     50.0" in shown
    kept = to_json([solved], 3)["traces"][0]
    assert [turn["action"] for turn in kept["turns"]] == ["SELECT * FROM nowhere", "SELECT 6"]


def test_rows_of_the_paper_and_those_with_feedback():
    def trace(id, *observations, reward=0.0):
        steps = [Step(observation=text, verdict="", reward=reward) for text in observations]
        return Trace(id=id, task="", turns=tuple(Turn(action="", step=step) for step in steps))

    solved = trace("mint-math/1", "x\nExpert feedback:\nGood.\n", reward=1.0)
    scores = paper_scores([solved, trace("mint-math/2", "x"), trace("mint-mmlu/1", "x"), trace("sql/a")])
    assert scores == {"M-MATH, feedback": 50, "M-MMLU": 0}
    header, *_ = format_agents(scores, "a name of 22 letters!").splitlines()
    assert header.endswith("gpt-4  a name of 22 letters!")
    _, math, mmlu = (line.split() for line in format_agents(scores, "ours").splitlines())
    assert math == ["M-MATH,", "feedback", "–", "–", "18.00", "–", "–", "50.00"]
    assert mmlu == ["M-MMLU", "42.11", "30.26", "56.58", "56.58", "80.26", "0.00"]


def test_an_endpoint_that_is_not_there_is_one_line_on_the_first_host(capsys, monkeypatch):
    pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")
    words = "eval --agents bash --limit 1 --endpoint http://127.0.0.1:9/v1 --endpoint-model x"
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert "the endpoint http://127.0.0.1:9/v1, model 'x': Connection error" in err
    assert len(err.splitlines()) == 1
    monkeypatch.setattr("lemur_jax.cluster.coordination.process", lambda: (1, 2))
    assert main(words.split()) == 0
    assert capsys.readouterr() == ("", "")


def test_what_was_done_before_an_endpoint_fails_is_kept(monkeypatch, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "lemur_jax.agents.runner")
    answers = iter(["SELECT count(*) FROM book"])

    def agent(messages, stops):
        if (text := next(answers, None)) is None:
            raise UserError("the endpoint is gone")
        return text

    def written():
        return json.loads((tmp_path / "traces.json").read_text())["agents"]["traces"]

    monkeypatch.setattr(episodes, "endpoint_agent", lambda *_, **__: agent)
    words = ["eval", "--agents", "sql", "--endpoint", "http://x", "--json", str(tmp_path / "traces.json")]
    assert main([*words, "--html", str(tmp_path / "page.html")]) == 2
    found = capsys.readouterr()
    assert "the endpoint is gone" in found.err
    assert "100.0" in found.out
    (trace,) = written()
    assert trace["solved_at"] == 1
    journal = tmp_path / "traces.json.episodes.jsonl"
    assert journal.exists()
    answers = iter(lambda: "SELECT 1", None)
    kept = journal.read_bytes()
    caplog.clear()
    assert main([*words, "--skip", "1", "--limit", "1"]) == 0
    assert "episodes: 0 of 1, up to 32 at once" in caplog.messages
    (trace,) = written()
    assert trace["id"] != "sql/count"  # what an earlier run has played too is not of this one
    journal.write_bytes(kept)
    assert main(words) == 0
    assert len(written()) > 1
    assert not journal.exists()  # it would answer for a checkpoint that has been trained further
    assert "sql/count: solved in turn 1" in (tmp_path / "page.html").read_text()


def test_odd_answers_of_an_endpoint(tmp_path, capsys):
    """The turn that is no text is kept; an answer without choices is one line. The episodes are of the endpoint's
    model, also where a checkpoint is named for `--tasks`."""
    pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")
    odd = [[], None, {"choices": [{}]}, {"choices": "x"}, {"choices": [{"message": {"content": 5}}]}]

    def answer(body):
        if body["model"] == "odd":
            return 200, odd.pop()
        return "x\ud83d" if len(body["messages"]) == 1 else (200, {"error": "overloaded"})

    path = tmp_path / "a.json"
    words = ["--endpoint-model", "theirs", "--checkpoint", "ours", "--html", str(tmp_path / "a.html")]
    with endpoint(answer) as url:
        words += ["--agents", "sql", "--limit", "1", "--endpoint", url, "--json", str(path)]
        assert main(["eval", *words, "--turns", "2"]) == 2
        err = capsys.readouterr().err
        assert "model 'theirs', sent no answer: " in err
        assert "overloaded" in err
        assert len(err.splitlines()) == 1
        assert main(["eval", *words, "--turns", "1"]) == 0
        while odd:
            with pytest.raises(UserError, match="model 'odd', sent no answer: "):
                episodes.endpoint_agent(url, "odd")([])
    assert "theirs: 0 of 1 episodes solved" in (tmp_path / "a.html").read_text(encoding="utf-8")
    (trace,) = json.loads(path.read_text())["agents"]["traces"]
    assert trace["turns"][0]["action"] == "x?"


def test_an_endpoint_gets_what_its_model_has_room_for():
    """One with room for 400 characters of messages, which says what it has read."""
    pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")
    seen = []

    def answer(body):
        seen.append(body.get("stop"))
        text = "|".join(message["content"] for message in body["messages"])
        return text if len(text) <= 400 else (400, {"error": "too long"})

    texts = ["the task", "do 0", "saw 0", "do 1", "first row" + ", row" * 999 + ", last row"]
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    with endpoint(answer) as url:
        agent = episodes.endpoint_agent(url, "x")
        task, action, rows = agent(messages).split("|")
        assert (task, action) == ("the task", "do 1")
        assert rows.startswith("first row")
        assert rows.endswith("last row")
        system = {"role": "system", "content": "Be brief."}
        assert agent([system, *messages]).startswith("Be brief.|the task|do 1|first row")
        with pytest.raises(UserError, match="Error code: 400"):
            agent(messages[-1:])
        # A rule of Markdown ends an action in MINT alone, and so does the fifth string, which OpenAI does not take.
        ruled = [{"role": "user", "content": "a\nHuman:\n---\nb"}]
        assert agent(ruled, environments.SqlEnvironment.stops) == ruled[0]["content"]
        assert agent(ruled, MintEnvironment.stops) == "a"
    assert seen[-2:] == [None, ["\nObservation:", "\nExpert feedback:", "\nTask:", "\n---"]]


def test_an_error_of_one_episode_does_not_lose_those_that_end_with_it(count):
    journal, broken = Journal(None, {}), environments.SqlEnvironment("sql/broken", "", "", "")
    broken.step = unittest.mock.Mock(side_effect=UserError("no feedback"))
    with pytest.raises(UserError, match="no feedback"):
        run_episodes([broken, count], scripted("SELECT 1", "SELECT 6"), max_turns=1, journal=journal)
    assert list(journal.traces) == [count.id]


def test_some_tasks_of_each_kind(monkeypatch):
    with pytest.raises(UserError, match="unknown environment 'x'"):
        episodes.open_environments(["x"])
    found = episodes.open_environments(["sql", "bash", "sql"], 2, skip=3)
    assert [environment.id for environment in found] == ["sql/group", "sql/order", "bash/sum"]
    ids = ["mint-gsm8k/0", "mint-gsm8k/1", "mint-gsm8k/2", "mint-math/0"]
    worlds = [environments.SqlEnvironment(id, "", "", "") for id in ids]
    monkeypatch.setattr(episodes, "open_mint", lambda *_, **__: worlds)
    assert [world.id for world in episodes.open_environments(["mint"], 2)] == [*ids[:2], ids[3]]
    tasks = len(environments.bash_environments())
    with pytest.raises(UserError, match=f"bash has {tasks} tasks, and all are skipped: --skip is {tasks}"):
        episodes.open_environments(["sql", "bash"], skip=tasks)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--agents bash --limit 0", "--limit is 0: it must be at least 1"),
        ("--agents bash --batch-tokens -1", "--batch-tokens is -1: it must be at least 1"),
        ("--agents bash --skip -3", "--skip is -3: it must be at least 0"),
        ("--agents bash --feedback-endpoint x", "--feedback-endpoint is for --agents mint"),
        ("--tasks humaneval --skip 3", "--skip is for --agents that play"),
        ("--agents intercode-sql --replay runs --skip 3", "--skip is for --agents that play"),
        ("--tasks humaneval --html a.html", "--html has no effect without --agents"),
        ("--tasks humaneval --scores Spider=62", "--scores has no effect without --suite"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(words, expected, capsys):
    assert main(["eval", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"lemur eval: {expected}")


def test_an_endpoint_is_asked_for_the_whole_batch_together():
    count = 3 + max(4, os.cpu_count())
    together = threading.Barrier(count)

    def agent(messages, stops):
        together.wait(20)  # raises where it waits in vain
        return "x"

    worlds = [environments.SqlEnvironment(f"sql/{number}", "", "", "") for number in range(count)]
    for world in worlds:
        world.step = lambda action: Step(observation="", verdict="wrong answer", done=True)
    assert len(run_episodes(worlds, agent, max_turns=1, batch=count)) == count


@pytest.mark.parametrize("hangs", ["agent", "feedback"])
def test_an_interrupt_does_not_wait_for_an_endpoint(count, hangs):
    def interrupt(*_):
        raise KeyboardInterrupt

    agent = (lambda *_: time.sleep(40)) if hangs == "agent" else scripted("x")
    count.step = lambda action: time.sleep(40)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_episode(count, agent, max_turns=1)
    signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 20


def test_an_evaluation_goes_on_after_a_kill_and_exports_what_was_solved(tmp_path, capsys, monkeypatch):
    worlds, path = environments.sql_environments()[:2], tmp_path / "episodes.jsonl"
    Journal(path, {"agent": "one that did not start"}).close()
    assert not path.exists()
    first = Journal(path, {"agent": "a"})
    run_episodes(worlds[:1], scripted("SELECT 6"), max_turns=1, journal=first)
    with pytest.raises(
        UserError, match=f"another run writes {path}: wait for its end, or name another --json"
    ):
        Journal(path, {"agent": "a"})
    first.close()
    with path.open("a") as file:
        file.write('{"id": "sql/fil')  # cut by the kill
    again = Journal(path, {"agent": "a"})
    traces = run_episodes(worlds, scripted("SELECT 1"), max_turns=1, journal=again)
    again.close()
    assert [trace.solved_at for trace in traces] == [1, None]
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(UserError, match="holds episodes of"):
        Journal(path, {"agent": "b"})
    path.write_text("[1]\n[2]\n")
    with pytest.raises(UserError, match="is not a journal"):
        Journal(path, {"agent": "a"})
    (tmp_path / "agents.json").write_text(json.dumps({"agents": to_json(traces, 1)}))
    words = ["export-traces", "--traces", f"{tmp_path}/agents.json", "--output", f"{tmp_path}/new/out.jsonl"]
    made = []
    fake = types.SimpleNamespace(prepare=lambda config, *, replace: made.append(config))
    monkeypatch.setitem(sys.modules, "lemur_jax.prepare.prepare", fake)  # which imports TensorFlow
    config = pathlib.Path(__file__).parents[2] / "configs" / "quickstart_base.py"
    assert main([*words, "--config", str(config), "--config.seed=5"]) == 0
    assert [config.seed for config in made] == [5]
    assert "1 solved episodes of 2" in capsys.readouterr().out
    (line,) = (tmp_path / "new" / "out.jsonl").read_text().splitlines()
    assert [message["role"] for message in json.loads(line)["messages"]] == ["user", "assistant"]
