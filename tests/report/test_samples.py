"""`lemur report --prompt`: the page shows what the newest checkpoint generates."""

import html
import json
import re
import shutil
from unittest.mock import Mock

import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.infer.complete import complete
from lemur_jax.infer.session import load
from lemur_jax.parallel.mesh import parse_mesh
from lemur_jax.report import samples
from lemur_jax.report.samples import MAX_NEW_TOKENS, SAMPLING, sample
from lemur_jax.text.chat_template import encode_chat

QUESTION = "what <is> value_1"
PROMPTS = ["value_1 = ", "other <b>"]


def test_the_page_shows_what_the_checkpoint_says(chat_model, stages, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chat_model, run)
    shutil.copy(stages[0] / "metrics.jsonl", run)
    config = json.loads((stages[0] / "config.json").read_text())
    config["init"]["checkpoint"] = str(chat_model)  # the stage "start"
    (run / "config.json").write_text(json.dumps(config))
    words = ["report", str(run), "--output", str(tmp_path / "report.html"), "--question", QUESTION]
    assert main([*words, *(word for prompt in PROMPTS for word in ("--prompt", prompt))]) == 0
    # As bytes: a model may say \r, which text mode would change.
    text = (tmp_path / "report.html").read_bytes().decode()
    section = text.partition("<h2>Samples</h2>")[2].partition("<h2>")[0]
    blocks = re.findall("<pre>(.*?)</pre>", section, re.DOTALL)
    shown = [html.unescape(re.sub("<[^>]*>", "", block)) for block in blocks]
    session = load(run, parse_mesh(""), "float32")
    tokenizer = session.need_tokenizer()
    ids = [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    ids.append(encode_chat(tokenizer, [{"role": "user", "content": QUESTION}], add_generation_prompt=True)[0])
    drawn = complete(session, ids, max_new_tokens=MAX_NEW_TOKENS, sampling=SAMPLING)
    assert re.findall("<h3>(.*?)</h3>", section) == ["start", "run"] * 3
    assert shown[::2] == shown[1::2]
    for prompt, text, completion in zip([*PROMPTS, QUESTION], shown[::2], drawn, strict=True):
        assert text.startswith(prompt)
        assert text.removeprefix(prompt).strip() == completion.text.strip() != ""


@pytest.mark.parametrize(
    ("recorded", "started"),
    [({"step": 6}, [6]), ({}, [None]), ({"step": 3}, [])],  # the base keeps steps 6 and 9
)
def test_the_start_is_the_step_that_the_run_has_recorded(tmp_path, monkeypatch, recorded, started):
    base, loaded = str(tmp_path), []
    run = Mock(workdir="run", config={"init.checkpoint": base})
    monkeypatch.setattr(samples, "read_runs", lambda _: [run])
    monkeypatch.setattr(samples, "read_metadata", lambda _: {"origins": {"init.checkpoint": recorded}})
    monkeypatch.setattr(samples, "steps_in", lambda path: (path, [6, 9]))
    monkeypatch.setattr(
        samples, "load", lambda path, mesh, dtype, step: loaded.append((path, step)) or Mock()
    )
    monkeypatch.setattr(samples, "complete", lambda *_, **__: [])
    sample(["run"], [])
    assert loaded == [*((base, step) for step in started), ("run", None)]


def test_a_run_without_a_checkpoint_is_refused(stages):
    with pytest.raises(UserError, match="no finished checkpoint"):
        sample(stages[:1], PROMPTS)
