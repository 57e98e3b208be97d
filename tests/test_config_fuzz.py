"""500 random overrides and config files: the value that was written, or one line and exit status 2."""

import ast
import math
import random

import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.config import flatten, load
from tests import test_config

CASES = 500
CONFIG = test_config.CONFIG.replace("    if arg:", "    config.eval.tasks = ('code',)\n    if arg:")
PLAIN = """
    1 0 -1 3.5 1e-3 -0.0 1e999 nan -inf 1_000 0x10 007 1e3 None True false yes concat adamw bfloat16
    full 'a' a=b () ( (1,) ('code',) code,text [1] ['a'] {} __import__('os')
"""
VALUES = [
    *PLAIN.split(), "9" * 400, "7 ", "", " ", "\xe9\u2028\x00", '"', "lambda: 1", "{'a': 1}", "{'code': ('x',)}",
    "{'code': {'share': 1.0}}", "{'code': {'share': 'x'}}", "{'a': {'step': 1, 'shares': {}}}",
]  # fmt: skip
STATEMENTS = """
config.{key} = {value!r}
config.{key} = {value}
del config.{key}
config.{key}.x = 1
return {value}
config.{key} += ({value})
config.update({{{key!r}: {value!r}}})
config['{key}'] = {value}
raise {value}
from lemur_jax import {value}
config.{key}[{value}] = 1
config = config.{key}
config.{key}()
"""


def written_as(text, default):
    """What a text means where the default stands; an error: nothing."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(default, int | float):
        return float(text) if isinstance(default, float) else int(text, 16 if "x" in text else 10)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, list):
        assert not isinstance(value, dict)
        return list(value) if isinstance(value, tuple | list) else [value]
    return value


@pytest.mark.slow
def test_500_random_configs(tmp_path, capsys):
    generator = random.Random(0)
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    whole = flatten(load(str(file)).to_json())
    outcomes = {"refused": 0, "accepted": 0}
    for case in range(CASES):
        key, value = generator.choice(sorted(whole)), generator.choice(VALUES)
        text, overrides = CONFIG, []
        kind = generator.choice(("override", "override", "unknown", "section", "statement", "damage"))
        if kind == "override":
            overrides = [f"--config.{key}={value}"]
        elif kind == "unknown":
            place = generator.randrange(len(key))
            odd = generator.choice(
                (key[:place] + key[place + 1 :], key + ".x", key + "[0]", "", ".", key[::-1])
            )
            overrides = [f"--config.{odd}={value}"] * (odd not in whole)
        elif kind == "section":
            overrides = [f"--config.{key.rpartition('.')[0] or 'train'}={value}"]
        elif kind == "statement":
            line = generator.choice(STATEMENTS.strip().splitlines()).format(key=key, value=value)
            text = CONFIG.replace("    return config", f"    {line}\n    return config")
        else:
            place = generator.randrange(len(text))
            text = text[:place] + generator.choice(("", "\0", "(", "é", "\t", "1", "=")) + text[place + 1 :]
        file.write_text(text)
        what = f"case {case}: {kind}, {key}, {value!r}, {overrides}"
        capsys.readouterr()
        status = main(["inspect", str(file), *overrides])
        out, err = capsys.readouterr()
        assert status == 2, what  # an accepted config has no stores here
        assert not out, what
        assert err.startswith("lemur inspect: "), (what, err)
        assert err.count("\n") == 1, (what, err)
        try:
            found = flatten(load(str(file), overrides).to_json())
        except UserError:
            outcomes["refused"] += 1
            continue
        outcomes["accepted"] += 1
        assert all(math.isfinite(each) for each in found.values() if isinstance(each, float)), what
        if kind in ("override", "unknown") and overrides:
            assert kind == "override", what
            others = {name: each for name, each in whole.items() if name != key}
            assert found == others | flatten({key: written_as(value, whole[key])}), what
    assert min(outcomes.values()) > 30, outcomes
