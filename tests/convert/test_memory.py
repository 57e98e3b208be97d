"""Weights stream: what converting takes grows with the largest tensor, and not with the model."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lemur_jax.convert import hf_config, layout
from lemur_jax.convert.safetensors_writer import plan_shards, write_index, write_shard
from lemur_jax.models.presets import preset

# The same for a small model first: what the libraries take is not meant. Then the kernel's high-water mark begins anew.
CONVERT = """
import json, re, sys
from lemur_jax.cli import main

def memory(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**10

first, second = json.loads(sys.argv[1])
assert main(first) == 0
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
assert main(second) == 0
print(memory("VmHWM") - before)
"""


def make_model(directory, config):
    """float32 weights that begin with the same numbers, for speed; gives MiB in all and of the largest tensor."""
    directory.mkdir()
    shapes = {name: weight.hf_shape for weight in layout.weights(config) for name in weight.names}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    numbers = np.random.default_rng(0).standard_normal(max(sizes.values()), np.float32)
    shards = plan_shards([(name, 4 * size) for name, size in sizes.items()], 2e8)
    for shard in shards:
        write_shard(
            directory / shard.file, shard.names, shapes, "float32",
            lambda name: numbers[: sizes[name]].reshape(shapes[name]),
        )  # fmt: skip
    write_index(directory, shards, 4 * sum(sizes.values()))
    described = hf_config.to_hf(config, dtype="float32", bos=1, eos=2, pad=None)
    (directory / "config.json").write_text(json.dumps(described))
    return 4 * sum(sizes.values()) / 2**20, 4 * max(sizes.values()) / 2**20


def grown(*verbs):
    """MiB that the second verb takes at most."""
    words = [sys.executable, "-c", CONVERT, json.dumps(verbs)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_import_and_an_export_hold_a_few_tensors(tmp_path):
    make_model(tmp_path / "small", preset("tiny"))
    shape = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=16)
    size, largest = make_model(tmp_path / "large", preset("tiny", num_hidden_layers=8, head_dim=64, **shape))
    assert size > 500
    assert largest == 16
    importing, exporting = (
        [
            [f"{verb}-hf", f"{tmp_path}/{name}{before}", f"{tmp_path}/{name}{after}", "--dtype", "bfloat16"]
            for name in ("small", "large")
        ]
        for verb, before, after in (("import", "", "-checkpoint"), ("export", "-checkpoint", "-exported"))
    )
    taken = {"import": grown(*importing), "export": grown(*exporting)}
    assert max(taken.values()) < 8 * largest, taken
