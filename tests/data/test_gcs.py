"""Stores on gs://, written and read through the same means as in a run, from an emulator of its server."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from lemur_jax.config import replace

# Run by itself: where gs:// is, is read from the environment when the libraries are imported.
SCRIPT = """
import json, sys
import numpy as np
from lemur_jax.common import logging
from lemur_jax.config import from_json
from lemur_jax.text import conversation_formats
from lemur_jax.prepare import tasks
from lemur_jax.prepare.prepare import prepare
from lemur_jax.prepare.fields import Fields
from lemur_jax.data.rows import ConcatRows, FitRows
from lemur_jax.data.store import TokenStore

logging.setup()
config, folder = from_json(json.loads(sys.argv[1])), sys.argv[2]
tasks.add_files("texts", f"{folder}/texts.jsonl", held_out=0.2)
tasks.add_files("talks", f"{folder}/talks.jsonl", Fields(messages=conversation_formats.openai), held_out=0.2)
for _ in range(2):
    prepare(config)
print("READ", flush=True)
read = {}
for name, rows_of in (("texts", ConcatRows), ("talks", FitRows)):
    rows = rows_of(TokenStore.open(f"{config.data.stores}/{name}/train"), 32)
    read |= {f"{name}-{key}": value for key, value in rows.read(np.array([5, 2, 3])).items()}
    read[f"{name}-ids"] = rows.documents(2)
np.savez(f"{folder}/read.npz", **read)
"""


@pytest.mark.slow
def test_stores_on_gs_are_those_of_a_disk(emulator, tmp_path, make_config, chat_dir):
    texts = [
        f"text number {n % 90} says " + " ".join(f"word{n % 90 * k}" for k in range(40)) for n in range(100)
    ]
    talks = [[("user", f"What is {n}?"), ("assistant", f"{n} is {n}.")] for n in range(60)]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts) + "{bad\n"
    )
    with (tmp_path / "talks.jsonl").open("w") as file:
        for talk in talks:
            messages = [{"role": role, "content": content} for role, content in talk]
            file.write(json.dumps({"messages": messages}) + "\n")
    options = {
        "tokenizer.path": str(chat_dir),
        "prepare.max_bad_share": 0.9,
        "prepare.steps": {"texts": {"exact_duplicates": {}, "near_duplicates": {}}},
        "eval.tasks": ("texts",),
    }
    config = replace(make_config("texts", "talks", **options), {"data.sources.talks.packing": "fit"})
    outputs = {}
    for place in ("gs://bucket/stores", str(tmp_path / "stores")):
        there = json.dumps(replace(config, {"data.stores": place}).to_json())
        command = [sys.executable, "-c", SCRIPT, there, str(tmp_path)]
        done = subprocess.run(command, env=emulator, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        # Without clocks, progress and places.
        differs = r"[\d.]+ s$|^.*(documents/s|so far).*\n|/tmp\S+|gs://\S+"
        said = re.sub(differs, "", done.stdout.partition("READ")[0], flags=re.MULTILINE)
        with np.load(tmp_path / "read.npz") as read:
            outputs[place] = said, {key: read[key].tolist() for key in read}
    on_gs, local = outputs.values()
    assert on_gs == local
    assert on_gs[0].count("unchanged") == 3
    assert "exact_duplicates removed" in on_gs[0]
    assert len(on_gs[1]["texts-ids"]) > 0
