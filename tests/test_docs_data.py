"""The walk-through of docs/data.md, run as it stands."""

import json
import pathlib

import pytest

from lemur_jax.data.store import TokenStore
from lemur_jax.prepare.cleaning import DEFAULTS
from tests.helpers.pages import run_page

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The directory in which every block of the page has run."""
    folder = tmp_path_factory.mktemp("walk")
    run_page("data.md", folder)
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
