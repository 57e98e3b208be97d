"""MINT's protocol and checkers, and recorded episodes where the data are there."""

import contextlib
import copy
import importlib.util
import json
import os
import pathlib
import resource
import sys
import tarfile
import time

import pytest

from lemur_jax.agents import alfworld, mint, mint_checks, sandbox, shell
from lemur_jax.agents.alfworld import AlfworldEnvironment
from lemur_jax.agents.mint_sets import open_mint
from lemur_jax.agents.replay import replay, replay_run
from lemur_jax.agents.shell import Shell, interpreter
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from tests.helpers.agents import scripted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
ARCHIVE = pathlib.Path(__file__).parents[3] / "shared" / "agents" / "mint.tar.xz"
ARCHIVE = pathlib.Path(os.environ.get("LEMUR_MINT_ARCHIVE", ARCHIVE))
GAME = "pick_heat_then_place_in_recep-Apple-None-Fridge-10/trial_T20190906_182353_418140"
needs_ipython = pytest.mark.skipif(
    importlib.util.find_spec("IPython") is None, reason="IPython is not installed: pip install '.[agents]'"
)


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (lambda: mint_checks.reasoning("6", "6.2"), True),
        (lambda: mint_checks.reasoning("6", "6.5"), False),
        (lambda: mint_checks.reasoning("-4.0", "-4"), False),
        (lambda: mint_checks.reasoning("Yes", "yes, both"), True),
        (lambda: mint_checks.choice("c", "18107", "Which?\nOptions: A ) 6 , B ) 121 , C ) 18107"), True),
        (lambda: mint_checks.choice("c", "121", "Which?\nOptions: A ) 6 , B ) 121 , C ) 18107"), False),
        (lambda: mint_checks.choice("c", "²", "Which?\nOptions: A ) 6 , B ) 121 , C ) 18107"), False),
        (lambda: mint_checks.theorem(1.12, "x = 1.118", "float"), True),
        (lambda: mint_checks.theorem(-100.0, "-104", "float"), True),
        (lambda: mint_checks.theorem(100.0, "104.5", "float"), False),
        (lambda: mint_checks.theorem([3, 2], "[2, 3]", "list of integer"), True),
        (lambda: mint_checks.theorem(False, "no", "bool"), True),
        (lambda: mint_checks.theorem("c", "c) all", "option"), False),
        (lambda: mint_checks.theorem("a", "'a' * 9999999999", "string"), False),
        (lambda: mint_checks.theorem(60, "__import__('os').getpid()", "integer"), False),
        (lambda: mint_checks.theorem(6.0, f"1{'0' * 400}", "float"), False),
        (lambda: mint_checks.code("assert f(2) == 4", "def f(x): return 2 * x"), True),
    ],
)
def test_checkers(check, expected):
    assert check() is expected


@needs_ipython
def test_an_episode_runs_cells_and_counts_turns():
    task = mint.Task(id="gsm8k/0", opening="Task", solved=lambda answer: mint_checks.reasoning("5", answer))
    environment = mint.MintEnvironment(task, {"wikipedia_search(query)": lambda query: f"Page: {query}"})
    try:
        environment.reset()
        environment.step("<execute>a = 4</execute>")
        seen = environment.step("<execute>print(wikipedia_search('x'), a + 1)\nb</execute>")
        assert seen.observation.startswith("Observation:\nPage: x 5\n-----")
        assert seen.observation.endswith(
            "\n\nNameError: name 'b' is not defined\nYou have 3 steps left and 2 chances to propose solution left.\n"
        )
        seen = (seen.verdict, environment.step("<execute>!echo $((2 + 3))</execute>").observation)
        assert seen[0] == "execution error"
        assert seen[1].startswith("Observation:\n5\nYou have 2 steps")
        assert not environment.step("<solution>6</solution>").done
        assert environment.step("<solution>5</solution>").reward == 1
    finally:
        environment.close()


@needs_ipython
def test_cells_run_in_another_interpreter(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "pyvenv.cfg").write_text(
        f"home = {sys.base_prefix}/bin\ninclude-system-site-packages = false\n"
    )
    packages = tmp_path / f"lib/python3.{sys.version_info.minor}/site-packages"
    packages.mkdir(parents=True)
    python = str(tmp_path / "bin" / "python")
    with pytest.raises(UserError, match=f"needs IPython, which {python} cannot import"):
        Shell({}, python=python).run_cell("1")
    # Where the user of the sandbox cannot read the packages, cells were answered as if each had ended its process.
    with monkeypatch.context() as patch:
        patch.setattr(shell, "interpreter", lambda python: interpreter(python)[:2])
        with pytest.raises(UserError, match="does not start in the sandbox: .*No module named 'IPython'"):
            Shell({}).run_cell("1")
    ours = [path for path in sys.path if path.endswith("-packages")]
    (packages / "ours.pth").write_text("\n".join(ours))
    (packages / "marked.py").write_text("MARK = 'of this one'")
    cells = Shell({}, python=python)
    try:
        assert "of this one" in cells.run_cell("import marked; print(marked.MARK)")
    finally:
        cells.close()


@needs_ipython
def test_what_a_cell_writes_into_the_pipe_ends_its_process_alone():
    cells = Shell({"put(object, place)": "put {} in {}".format})
    call = json.dumps({"call": "put", "arguments": ["a"]})
    cell = """
import os, signal
signal.signal = signal.alarm = lambda *_: None
for pipe in range(3, 100):
    try:
        while True:
            os.write(pipe, %r)
    except OSError:
        pass
"""
    for written in (f"{call}\n", "no end"):
        started = time.monotonic()
        assert cells.run_cell(cell % written.encode()) == shell.ENDED
        assert time.monotonic() - started < shell.CELL_SECONDS / 2  # ended by what it wrote, not by the clock
        assert cells.run_cell("1 + 1") == "Out[1]: 2\n"
    cells.close()


@needs_ipython
def test_a_cell_that_catches_its_time_out_or_leaves_a_thread_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(shell, "CELL_SECONDS", 1)
    cells, started = Shell({}), time.monotonic()
    assert "TimeoutError" in cells.run_cell("import time\ntime.sleep(60)")
    catches = "while True:\n  try:\n    time.sleep(60)\n  except BaseException:\n    pass"
    assert cells.run_cell(catches) == shell.ENDED
    cells.run_cell("import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()")
    cells.close()
    assert time.monotonic() - started < 40


GAME_PROCESS = """import json, sys
print(json.dumps(["", False]), flush=True)
for number, line in enumerate(sys.stdin, start=1):
    print(json.dumps([f"{json.loads(line)} {number}", False]), flush=True)
"""


class Cells(Shell):
    """Without IPython and the box: a cell is an expression."""

    def run_cell(self, code):
        self.cells = [*getattr(self, "cells", ()), code]
        return f"{eval(code, dict(self._functions))} of {len(self.cells)}"


def test_copies_of_a_task_share_neither_shell_nor_game(tmp_path, monkeypatch):
    """As `lemur rl` plays a group."""
    (tmp_path / "game.py").write_text(GAME_PROCESS)
    monkeypatch.setattr(alfworld, "_SCRIPT", tmp_path / "game.py")
    monkeypatch.setattr(mint, "Shell", Cells)
    task = AlfworldEnvironment(mint.Task(id="alfworld/x", opening="", solved=lambda _: False), tmp_path)
    played = [copy.copy(task) for _ in range(2)]
    for one in played:
        one.reset()
    for number in (1, 2):
        seen = [one.step("<execute>goto('fridge')</execute>").observation for one in played]
        assert all(f"go to fridge {number} of {number}\n" in text for text in seen)
    for one in played:
        one.close()


def test_a_proposal_without_its_end_counts_and_an_expert_comments_every_turn_but_the_last():
    opening = "Rules\n---\nTask:\nx"
    task = mint.Task(id="gsm8k/0", opening=opening, solved=lambda answer: False)
    environment = mint.MintEnvironment(task, {})
    environment.expert = agent = scripted("This is BAD.", "Good.")
    environment.reset()
    first = environment.step("<execute>1</execute> <solution> 5")
    assert first.verdict == "invalid action"
    assert first.observation.endswith(
        "1 chances to propose solution left.\n\nExpert feedback:\nThis is BAD.\n"
    )
    assert not environment.step("hm").done
    last = environment.step("<solution>6</solution>")
    assert last.done
    assert "Expert" not in last.observation
    shown = agent.seen[1][0]["content"]
    assert "Rules" not in shown
    places = list(map(shown.index, ("Task:", "<solution> 5", "This is BAD.", "hm")))
    assert places == sorted(places)
    assert shown.endswith(mint.FEEDBACK)


@needs_ipython
def test_recorded_episodes_give_their_observations_and_verdicts(tmp_path):
    _extract(tmp_path, "processed/gsm8k", "lemur-70b-chat-v1/F=None")
    runs = mint.recorded_run(tmp_path / "data/outputs/lemur-70b-chat-v1/F=None")
    solved = {name: sum(one.success for one in run) for name, run in runs.items()}
    assert solved == dict(zip(mint.SETS, (28, 6, 4, 19, 43, 21, 16, 80), strict=True))
    environments = open_mint(str(tmp_path), ["gsm8k"], {"gsm8k": runs["gsm8k"]})
    episodes = replay(environments, runs["gsm8k"][:8])
    assert all(one.same_verdict and not one.different for one in episodes)


def _extract(path, *wanted):
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE} is not there: {mint.WHERE}")
    with tarfile.open(ARCHIVE) as archive:
        members = [member for member in archive if any(part in member.name for part in wanted)]
        archive.extractall(path, members, filter="data")


@needs_ipython
@pytest.mark.slow
def test_a_game_that_ends_after_its_actions_counts_as_solved(tmp_path):
    pytest.importorskip("textworld", reason="ALFWorld is not installed: pip install '.[alfworld]'")
    _extract(tmp_path, GAME)
    game = tmp_path / "data/processed/alfworld/json_2.1.1/valid_unseen" / GAME / "game.tw-pddl"
    environment = AlfworldEnvironment(mint.Task(id="alfworld/x", opening="", solved=lambda _: False), game)
    environment.reset()
    try:
        cell = "print(goto('fridge 1'))\nprint(open_receptacle('fridge 1'))"
        seen = environment.step(f"<execute>{cell}</execute>")
        assert "The fridge 1 is closed.\nYou open the fridge 1." in seen.observation
        assert environment.step("<solution>done</solution>").verdict == "wrong answer"
        assert environment.step("<execute>for _ in range(47): look()</execute>").reward == 0
        assert environment.step("<execute>look()</execute>").reward == 1
    finally:
        environment.close()


def test_wrong_data_is_one_line(tmp_path, capsys, monkeypatch):
    assert main(["eval", "--agents", "mint", "--data", str(tmp_path), "--replay", str(tmp_path)]) == 2
    assert "holds no results.jsonl of MINT" in capsys.readouterr().err
    other = tmp_path / "max3_p1" / "reasoning" / "gsm8k" / "results.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({}) + "\n")
    with pytest.raises(UserError, match="is not a run of the protocol"):
        mint.recorded_run(tmp_path)
    own = tmp_path / mint.PROTOCOL / "gsm8k"
    own.mkdir(parents=True)
    history = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Assistant:\nhm\n"}]
    state = {"history": history, "terminate_reason": "", "success": False}
    (own / "results.jsonl").write_text(json.dumps({"state": state, "task": {"task_id": 1}}) + "\n")
    monkeypatch.chdir(own)
    # Its name is that of the directory.
    (episode,) = mint.recorded_run(pathlib.Path("results.jsonl"))["gsm8k"]
    assert episode.turns == [("hm", None)]
    with pytest.raises(UserError, match="intercode-sql alone, .* not intercode-sql,mint"):
        replay_run(["intercode-sql", "mint"], "", "", None, contextlib.ExitStack())
    with pytest.raises(UserError, match=r"has no processed/gsm8k"):
        open_mint(str(tmp_path), [])


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": 1, "reference": "x"}', b'"\xff"'])
def test_a_damaged_file_is_named(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    for path in ("processed/mmlu/test_prompts.json", f"{mint.PROTOCOL}/mmlu/results.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"mmlu/test_prompts.json is not a task of MINT .*: get data/"):
        mint.load_tasks(tmp_path, "mmlu", {})
    with pytest.raises(UserError, match=r"mmlu/results.jsonl is not an episode of MINT .*: get data/"):
        mint.recorded_run(tmp_path)


def test_a_shell_that_does_not_start_and_says_nothing_is_named_by_its_exit_code(monkeypatch):
    def end(*_, channels, **__):
        list(map(os.close, channels))
        return sandbox.Result(code=1, output="", errors="", seconds=0.0, isolation="")

    monkeypatch.setattr(shell, "interpreter", lambda python: (python, sys.base_prefix))
    monkeypatch.setattr(shell, "run", end)
    with pytest.raises(UserError, match="does not start in the sandbox: exit code 1"):
        Shell({}).run_cell("1")


def test_a_shell_of_a_large_batch(monkeypatch):
    """Among a thousand open files (`select.select` takes no descriptor above 1,023), with hours between two cells."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("needs 2,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]

    def answer(*_, limits, channels, **__):
        assert limits.wall_seconds > mint.MAX_STEPS * 3600
        os.write(channels[1], b'{"output": ""}\n')
        os.read(channels[0], 100)
        os.write(channels[1], b'{"output": "1"}\n')
        return sandbox.Result(code=0, output="", errors="", seconds=0.0, isolation="")

    monkeypatch.setattr(shell, "interpreter", lambda python: (python, sys.base_prefix))
    monkeypatch.setattr(shell, "run", answer)
    cells = Shell({})
    try:
        assert cells.run_cell("1") == "1"
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
