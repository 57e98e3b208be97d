"""Slice names against the published table of slices."""

import itertools
import os
import subprocess
import sys

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.plan import topologies


@pytest.mark.parametrize(
    ("name", "shape", "chips", "wrap"),
    [  # https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e
        ("V4-8", (2, 2, 1), 4, (False, False, False)),
        ("v4-32", (2, 2, 4), 16, (False, False, False)),
        ("v4-384", (4, 4, 12), 192, (True, True, True)),
        ("v5e-16x16", (16, 16), 256, (True, True)),
        ("v5p-8x4x12", (4, 8, 12), 384, (True, True, True)),
        ("v4-512", (4, 8, 8), 256, (True, True, True)),
        ("v5litepod-16", (4, 4), 16, (False, False)),
        ("v5e-128", (8, 16), 128, (False, True)),
        ("v5p-128", (4, 4, 4), 64, (True, True, True)),
        ("tpu7x-128", (4, 4, 4), 64, (True, True, True)),
    ],
)
def test_known_slices(name, shape, chips, wrap):
    tpu = topologies.find_slice(name)
    assert (tpu.shape, tpu.chips, tpu.wrap) == (shape, chips, wrap)
    assert topologies.find_slice(name, 2).chips == 2 * chips


def test_every_name_finds_itself():
    for name in topologies.slice_names():
        assert topologies.find_slice(name).name == name


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("v4-500", "v4-512"),
        ("v5-8", "v5p-8"),
        ("v6e-300", "v6e-256"),
        ("v5p", "v5p-8"),
        ("", "v4-8"),
        ("v5e-4x4x4", "v5e-16"),
        ("v4-4x4x6", "v4-8"),
        ("v4-0x4x4", "v4-8"),
    ],
)
def test_unknown_name_lists_the_known_ones(wrong, near):
    with pytest.raises(UserError, match=f"unknown TPU slice '{wrong}'.* {near}"):
        topologies.find_slice(wrong)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", ["v4-32", "v4-384", "v5e-8", "v5p-8", "v6e-4x4", "tpu7x-8"])
def test_described_devices(tpu_compiler, name, slices):
    tpu = topologies.find_slice(name, slices)
    devices = topologies.described_devices(tpu)
    assert len(devices) == tpu.devices
    places = {tuple(device.coords[: len(tpu.shape)]) for device in devices}
    assert places == set(itertools.product(*map(range, tpu.shape)))


def test_without_the_compiler_one_line_says_what_to_install():
    """In a process of its own, in which libtpu cannot be imported and JAX has not looked for it yet."""
    program = (
        "import sys; sys.modules['libtpu'] = None\n"
        "from lemur_jax.cli import main\n"
        "sys.exit(main(['plan', '--config', 'configs/quickstart_lemur.py', '--topology', 'v5e-1']))"
    )
    found_here = "TPU_LIBRARY_PATH"  # set where libtpu was imported
    environment = {name: value for name, value in os.environ.items() if name != found_here}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    said = (
        "lemur plan: planning needs the TPU compiler libtpu (Linux on x86_64): python -m pip install libtpu\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", said)
