"""Agents on two hosts: one plays, both compute."""

import json

import pytest

from lemur_jax.models.presets import preset
from tests.helpers.hosts import finish
from tests.helpers.runs import write_model

# Each host's environments say something else, of another length.
OWN_OBSERVATIONS = """
from lemur_jax.agents.environments import SqlEnvironment, Step
seen = f"host {host} " * (1 + 200 * int(host))
SqlEnvironment.step = lambda self, action: Step(observation=seen, verdict="wrong answer")
"""


@pytest.mark.slow
def test_agents_of_two_hosts_see_what_the_first_sees(hosts_project, small_chat_tokenizer, tmp_path):
    model = preset("tiny", vocab_size=small_chat_tokenizer.vocab_size)
    write_model(tmp_path / "chat", model, small_chat_tokenizer.files())
    words = ["eval", "--agents", "sql", "--limit", "2", "--turns", "3", "--max-new-tokens", "16"]
    words += ["--checkpoint", str(tmp_path / "chat"), "--json", str(tmp_path / "agents.json")]
    primary, other = finish(hosts_project.patched(OWN_OBSERVATIONS, *words))
    assert "sql failures" in primary
    assert "episodes" not in other
    traces = json.loads((tmp_path / "agents.json").read_text())["agents"]["traces"]
    assert {turn["step"]["observation"] for trace in traces for turn in trace["turns"]} == {"host 0 "}
    assert not (tmp_path / "agents.json.episodes.jsonl").exists()
