"""Runs a page of docs as it stands: its Python blocks become files, its one bash block is run line by line."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# Commands of `lemur` in one process: each start would import TensorFlow and JAX again.
LEMUR = """
import contextlib, json, sys
from lemur_jax.cli import main

for number, words in enumerate(json.loads(sys.argv[1])):
    with open(f"{number}.out", "w") as file, contextlib.redirect_stdout(file):
        if status := main(words):
            sys.exit(f"lemur {words} ended with {status}")
"""


def run_page(name: str, folder: pathlib.Path) -> None:
    """Writes the blocks of `docs/NAME` that begin with `# FILE.py` to `folder` and runs the commands there.

    What the n-th command of `lemur` prints goes to `n.out`. Commands of `python` come first.
    """
    page = (ROOT / "docs" / name).read_text()
    for file, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (folder / file).write_text(code)
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    scripts = [words[1:] for words in commands if words[0] == "python"]
    verbs = [words[1:] for words in commands if words[0] == "lemur"]
    assert commands == [*(["python", *words] for words in scripts), *(["lemur", *words] for words in verbs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for words in (*scripts, ["-c", LEMUR, json.dumps(verbs)]):
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
