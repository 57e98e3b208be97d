"""Weights stream: what converting takes grows with the largest tensor, and not with the model."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lemur_jax.convert import hf_config, layout
from lemur_jax.convert.safetensors import write_weights
from lemur_jax.models.presets import preset

# The same for a small model first: what the libraries take is not meant. Then the kernel's high-water mark begins anew.
MEASURE = """
import json, re, sys

def memory(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**10

first, second = json.loads(sys.argv[1])
run(first)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
run(second)
print(memory("VmHWM") - before)
"""

CONVERT = """
from lemur_jax.cli import main

def run(words):
    assert main(words) == 0
"""

# Straight onto eight devices, in half the bytes.
LOAD = """
from lemur_jax.cluster.hosts import choose_platform
choose_platform(8)
import jax
from lemur_jax.convert.source import open_source
from lemur_jax.infer.session import abstract_params
from lemur_jax.parallel.mesh import make_mesh, parse_mesh

def run(directory):
    source = open_source(directory)
    jax.block_until_ready(source.restore(abstract_params(source.model, make_mesh(parse_mesh("")), "bfloat16")))
"""


def make_model(directory, config):
    """float32 weights that begin with the same numbers, for speed; gives MiB in all and of the largest tensor."""
    directory.mkdir()
    shapes = {name: weight.hf_shape for weight in layout.weights(config) for name in weight.names}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    numbers = np.random.default_rng(0).standard_normal(max(sizes.values()), np.float32)
    tensors = ((name, numbers[: sizes[name]].reshape(shape)) for name, shape in shapes.items())
    write_weights(directory, shapes, "float32", tensors, 2e8)
    described = hf_config.to_hf(config, dtype="float32", bos=1, eos=2, pad=None)
    (directory / "config.json").write_text(json.dumps(described))
    return 4 * sum(sizes.values()) / 2**20, 4 * max(sizes.values()) / 2**20


def grown(run, *arguments):
    """MiB that a call with the second argument takes at most."""
    words = [sys.executable, "-c", run + MEASURE, json.dumps(arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(directory of a small and a large model, total MiB of the large one, MiB of its largest tensor)."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "small", preset("tiny"))
    shape = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=16)
    return root, *make_model(root / "large", preset("tiny", num_hidden_layers=8, head_dim=64, **shape))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_import_and_an_export_hold_a_few_tensors(models):
    root, size, largest = models
    assert size > 500
    assert largest == 16
    importing, exporting = (
        [
            [f"{verb}-hf", f"{root}/{name}{before}", f"{root}/{name}{after}", "--dtype", "bfloat16"]
            for name in ("small", "large")
        ]
        for verb, before, after in (("import", "", "-checkpoint"), ("export", "-checkpoint", "-exported"))
    )
    taken = {"import": grown(CONVERT, *importing), "export": grown(CONVERT, *exporting)}
    assert max(taken.values()) < 8 * largest, taken


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_onto_devices_holds_one_parameter_more(models):
    root, size, largest = models
    stacked = 8 * largest / 2  # one matrix of all layers, in bfloat16
    taken = grown(LOAD, *(str(root / name) for name in ("small", "large")))
    assert size / 2 <= taken < size / 2 + stacked + 4 * largest, taken
