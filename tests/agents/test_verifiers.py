"""Our environments as a taskset of `verifiers`, and a taskset of its kind with a model of ours."""

import json
import sys

import pytest

from lemur_jax.cli import main
from tests.helpers.endpoint import endpoint
from tests.helpers.verifiers import TASKSET


@pytest.fixture
def model():
    """One that knows 6 and, when asked again, the query that counts books; with what it was asked."""
    asked = []

    def answer(body):
        asked.append(body)
        return "6" if len(body["messages"]) < 3 else "SELECT count(*) FROM book"

    with endpoint(answer) as url:
        yield url, asked


def test_tasksets_both_ways(model, tmp_path, monkeypatch, capsys, caplog):
    pytest.importorskip("verifiers.v1", reason="verifiers is not installed: pip install '.[verifiers]'")
    url, asked = model
    (tmp_path / "lemur_test_sums.py").write_text(TASKSET)
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "agents.json"

    def run(taskset):
        asked.clear()
        words = ["--endpoint", url, "--endpoint-model", "m", "--json", str(output), "--limit", "2"]
        assert main(["eval", "--agents", f"verifiers:{taskset}", *words]) == 0
        return json.loads(output.read_text())["agents"]["traces"]

    first, second = run("lemur-test-sums")
    assert [first["solved_at"], second["solved_at"]] == [None, 1]
    assert second["task"] == "Add.\n5 + 1?"
    assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]
    count, other = run("lemur-verifiers")
    assert (count["id"], count["solved_at"], other["solved_at"]) == ("lemur-verifiers/sql/count", 2, None)
    assert count["turns"][0]["step"]["observation"].startswith("Error: ")
    assert len(other["turns"]) == 5
    # A killed evaluation goes on.
    monkeypatch.setattr("lemur_jax.cli.evaluation._write_agents", lambda *_: sys.exit(143))
    with pytest.raises(SystemExit):
        run("lemur-test-sums")
    assert len(asked) == 2
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    assert run("lemur-test-sums") == [first, second]
    assert not asked
    # One episode with an error is named, and the others count.
    judge = "assert self.data.answer == '2', 'no judge'\n        return float("
    broken = TASKSET.replace("return float(", judge)
    assert broken != TASKSET
    (tmp_path / "lemur_test_broken.py").write_text(broken)
    (only,) = run("lemur-test-broken")
    assert only["id"] == first["id"].replace("sums", "broken")
    assert "not scored: 1 episodes with an error" in caplog.text
    words = ["--endpoint", url, "--agents", "verifiers:lemur-nowhere"]
    assert main(["eval", *words]) == 2
    assert "the taskset 'lemur-nowhere' of verifiers cannot be loaded" in capsys.readouterr().err


def test_without_the_library_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    monkeypatch.delitem(sys.modules, "lemur_jax.agents.verifiers_adapter", raising=False)
    assert main(["eval", "--endpoint", "http://x", "--agents", "verifiers:gsm8k"]) == 2
    assert "pip install 'lemur_jax[verifiers]'" in capsys.readouterr().err
