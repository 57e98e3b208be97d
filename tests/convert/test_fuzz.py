"""500 damaged Hugging Face directories: an error of one line or the same weights, never a traceback."""

import json
import shutil
import time

import jax
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.convert.import_hf import load_hf_params

CASES = 500
VALUES = (
    *(None, True, -1, 0, 1, 3, 7, 10**30, 0.5, 1e300, float("nan")),
    *("", "4", "silu", [], [1], {}, {"a": 1}),
)


def change_bytes(rng, content):
    """Flips a bit, removes, inserts or repeats some bytes, or truncates."""
    start, length = rng.integers(len(content)), rng.integers(1, 60)
    match rng.integers(5):
        case 0:
            content[start] ^= 1 << rng.integers(8)
        case 1:
            del content[start : start + length]
        case 2:
            content[start:start] = rng.bytes(length)
        case 3:
            content[start:start] = content[start : start + length]
        case 4:
            del content[start:]
    return content


def replace_value(rng, content):
    """Another value of one key of a JSON object, of any depth."""
    tree = json.loads(content)
    node, path = tree, None
    while isinstance(node, dict) and node and (path is None or rng.random() < 0.7):
        path = (node, list(node)[rng.integers(len(node))])
        node = node[path[1]]
    parent, key = path
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = VALUES[rng.integers(len(VALUES))]
    return bytearray(json.dumps(tree).encode())


def damage(rng, directory):
    """Damages one file; returns its name and that of the damage."""
    kind = ("config.json", "model.safetensors.index.json", "header")[rng.integers(3)]
    file = directory / kind
    if kind == "header":
        file = sorted(directory.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    change = change_bytes if rng.random() < 0.6 else replace_value
    if kind != "header":
        file.write_bytes(change(rng, content))
    else:
        length = int.from_bytes(content[:8], "little")
        header = change(rng, content[8 : 8 + length] if change is replace_value else content[: 8 + length])
        prefix = len(header).to_bytes(8, "little") if change is replace_value else b""
        file.write_bytes(prefix + header + content[8 + length :])
    return kind, change.__name__


@pytest.mark.slow
def test_damaged_directories(make_model, tmp_path):
    hf = make_model(shard="20KB")
    config, params = load_hf_params(hf.path)
    rng = np.random.default_rng(0)
    refused = []
    for case in range(CASES):
        directory = tmp_path / "damaged"
        shutil.copytree(hf.path, directory)
        what = (case, *damage(rng, directory))
        started = time.monotonic()
        try:
            found, loaded = load_hf_params(directory)
        except UserError as error:
            refused.append(str(error))
        else:
            assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params)), what
            assert found == config or what[1] == "config.json", what
        assert time.monotonic() - started < 30, what
        shutil.rmtree(directory)
    assert 0.5 * CASES < len(refused) < CASES
    assert max(map(len, refused)) < 1000
