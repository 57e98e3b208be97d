"""The walk-through of docs/data.md, run as it stands."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from lemur_jax.data.store import TokenStore
from lemur_jax.prepare.cleaning import DEFAULTS

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The directory in which every block of the page has run."""
    folder = tmp_path_factory.mktemp("walk")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).write_text(code)
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for command in commands.strip().splitlines():
        words = command.split()
        start = {"lemur": ["-m", "lemur_jax.cli"], "python": []}[words[0]]
        done = subprocess.run(
            [sys.executable, *start, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        (folder / f"{len(list(folder.glob('*.out')))}.out").write_text(done.stdout)
    return folder


def test_every_source_is_in_a_store_and_was_trained_on(walk):
    for task in ("code", "text", "chat"):
        for split in ("train", "validation"):
            assert TokenStore.open(walk / "stores" / task / split).num_documents > 0
    records = [json.loads(line) for line in (walk / "run/metrics.jsonl").read_text().splitlines()]
    assert {record["task"] for record in records if record["kind"] == "eval"} == {"code", "text", "chat"}


def test_the_steps_did_what_the_page_says(walk):
    removed = json.loads((walk / "stores/code/train.removed.json").read_text())
    # Both languages have the same files, and a tenth of them another licence.
    assert {"metadata", "exact_duplicates"} <= set(removed)
    assert removed["metadata"]["examples"][0]["reason"] == "max_stars_repo_licenses is 'unknown'"
    page = (walk / "code.html").read_text()
    assert "&lt;reponame&gt;" in page
    assert "&lt;fim_middle&gt;" in page
    folders = [walk / "stores/chat/train.quarantine.jsonl", walk / "stores/chat/validation.quarantine.jsonl"]
    (bad,) = [json.loads(line) for file in folders if file.exists() for line in file.read_text().splitlines()]
    assert bad["where"].endswith("sharegpt.jsonl: line 201")


def test_the_page_names_every_step():
    assert all(f"`{step}`" in PAGE for step in DEFAULTS)
