"""Runs a page of docs as it stands: its Python blocks become files, its one bash block is run line by line."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run_page(name: str, folder: pathlib.Path) -> None:
    """Writes the blocks of `docs/NAME` that begin with `# FILE.py` to `folder` and runs the commands there."""
    page = (ROOT / "docs" / name).read_text()
    for file, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (folder / file).write_text(code)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for command in commands.strip().splitlines():
        words = shlex.split(command, comments=True)
        start = {"lemur": ["-m", "lemur_jax"], "python": []}[words[0]]
        done = subprocess.run(
            [sys.executable, *start, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        (folder / f"{len(list(folder.glob('*.out')))}.out").write_text(done.stdout)
