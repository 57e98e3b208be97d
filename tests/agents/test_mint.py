"""MINT's protocol and checkers, and recorded episodes where the data are there."""

import importlib.util
import json
import os
import pathlib
import sys
import tarfile

import pytest

from lemur_jax.agents import mint, mint_checks
from lemur_jax.agents.replay import replay
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
ARCHIVE = pathlib.Path(
    os.environ.get(
        "LEMUR_MINT_ARCHIVE", pathlib.Path(__file__).parents[3] / "shared" / "agents" / "mint.tar.xz"
    )
)
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
        (lambda: mint_checks.theorem(1.12, "x = 1.118", "float"), True),
        (lambda: mint_checks.theorem([3, 2], "[2, 3]", "list of integer"), True),
        (lambda: mint_checks.theorem(False, "no", "bool"), True),
        (lambda: mint_checks.theorem("c", "c) all", "option"), False),
        (lambda: mint_checks.theorem("a", "'a' * 9999999999", "string"), False),
        (lambda: mint_checks.theorem(60, "__import__('os').getpid()", "integer"), False),
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
        assert (seen.verdict, environment.step("hm").verdict) == ("execution error", "invalid action")
        assert not environment.step("<solution>6</solution>").done
        assert environment.step("<solution>5</solution>").reward == 1
    finally:
        environment.close()


@needs_ipython
def test_recorded_episodes_give_their_observations_and_verdicts(tmp_path):
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE} is not there: {mint.WHERE}")
    with tarfile.open(ARCHIVE) as archive:
        wanted = ("processed/gsm8k", "lemur-70b-chat-v1/F=None")
        archive.extractall(
            tmp_path,
            [m for m in archive.getmembers() if any(part in m.name for part in wanted)],
            filter="data",
        )
    runs = mint.recorded_run(tmp_path / "data/outputs/lemur-70b-chat-v1/F=None")
    solved = {name: sum(one.success for one in run) for name, run in runs.items()}
    assert solved == dict(zip(mint.SETS, (28, 6, 4, 19, 43, 21, 16, 80), strict=True))
    environments = mint.open_mint(str(tmp_path), ["gsm8k"], {"gsm8k": runs["gsm8k"]})
    episodes = replay(environments, runs["gsm8k"][:8])
    assert all(one.same_verdict and not one.different for one in episodes)


def test_wrong_data_is_one_line(tmp_path, capsys):
    assert main(["eval", "--agents", "mint", "--data", str(tmp_path), "--replay", str(tmp_path)]) == 2
    assert "holds no results.jsonl of MINT" in capsys.readouterr().err
    other = tmp_path / "max3_p1" / "reasoning" / "gsm8k" / "results.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({}) + "\n")
    with pytest.raises(UserError, match="is not a run of the protocol"):
        mint.recorded_run(tmp_path)
    with pytest.raises(UserError, match=r"has no processed/gsm8k"):
        mint.data_directory(str(tmp_path))
