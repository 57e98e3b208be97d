"""The benchmark of the train step, in small, on the CPU: both sides train, and the figures are there."""

import importlib.util
import math
import pathlib
import re

import pytest

SMALL = ["--preset", "tiny", "--batch", "8", "--length", "64", "--steps", "1", "--rounds", "2"]


@pytest.fixture(scope="module")
def benchmark():
    path = pathlib.Path(__file__).parent.parent / "benchmarks" / "train_step.py"
    spec = importlib.util.spec_from_file_location("train_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(text):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text)]


def test_both_sides_train_in_turn(benchmark, capsys):
    benchmark.main(SMALL)
    text = capsys.readouterr().out
    assert losses(text) == pytest.approx([math.log(512)] * 2, abs=0.2)  # fresh weights know nothing
    ratio = (
        r"lemur_jax has \d+\.\d+ × transformers' speed; from import to the end of the first step: \d+\.\d s"
    )
    assert re.search(ratio, text)


@pytest.mark.slow
def test_apart_tells_the_share_of_the_matmul_peak(benchmark, capsys):
    benchmark.main([*SMALL, "--dtype", "bfloat16", "--apart", "--matmul", "256"])
    text = capsys.readouterr().out
    assert losses(text) == pytest.approx([math.log(512)] * 2, abs=0.2)
    assert len(re.findall(r"\d+\.\d% of the measured matmul peak", text)) == 2
