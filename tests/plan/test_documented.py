"""Every `lemur plan` command of the pages and configs is accepted, up to the compiler."""

import pathlib
import re
import shlex

import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.plan import generate, plan
from lemur_jax.rl import plan as rl_plan

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]
COMMANDS = sorted(
    {
        line.partition("  #")[0].strip()
        for path in TEXTS
        for line in re.findall(
            r"^ *lemur (plan .*configs/.*)$", re.sub(r"\\\n *", "", path.read_text()), re.M
        )
    }
)


class Compiles(UserError):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_plan_reaches_the_compiler(tpu_compiler, monkeypatch, command, tmp_path, capsys):
    def stop(*_, **__):
        raise Compiles("as far as the compiler")

    for module in (plan, generate, rl_plan):
        monkeypatch.setattr(module, "compile_program", stop)
    monkeypatch.setattr("lemur_jax.plan.search.search", lambda config, *_, **__: plan.plan(config, "v4-32"))
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(command)]
    assert main(words) == 2
    assert "as far as the compiler" in capsys.readouterr().err
