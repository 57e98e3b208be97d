"""Measures import and export against `cp`: memory, throughput, bit-exactness.

Makes a random Llama of any preset in Hugging Face's format, imports it, exports it again and compares the tensors bit
for bit; `cp` copies the same directory in the same run. Peak memory is that of the whole `lemur` process, including
mapped file pages. With `--load`, the directory is also loaded onto eight virtual devices, as by `--checkpoint`, which
needs memory for the whole model.

    python benchmarks/convert.py --preset llama2_7b --directory /tmp/convert
    python benchmarks/convert.py --preset llama2_70b --layers 4 --directory /tmp/convert
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from lemur_jax.convert import hf_config, layout
from lemur_jax.convert.hf_weights import open_weights
from lemur_jax.convert.safetensors import write_weights
from lemur_jax.models.presets import preset


def make_model(directory: pathlib.Path, config, seed: int = 0) -> None:
    """Writes normal bfloat16 weights in shards of 5 GB."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shapes = {name: weight.hf_shape for weight in layout.weights(config) for name in weight.names}

    def tensors():
        for name, shape in shapes.items():
            yield name, (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    write_weights(directory, shapes, "bfloat16", tensors(), 5e9)
    described = hf_config.to_hf(config, dtype="bfloat16", bos=1, eos=2, pad=None)
    (directory / "config.json").write_text(json.dumps(described))


def timed(words: list[str]) -> tuple[float, float]:
    """(seconds, peak GiB) of a command; including the `sync` of what it wrote."""
    os.sync()
    started = time.perf_counter()
    process, peak = subprocess.Popen(words), 0
    while process.poll() is None:  # the kernel's figure would include this process, before exec
        with contextlib.suppress(OSError, StopIteration):
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, int(next(line for line in status if line.startswith("VmHWM")).split()[1]))
        time.sleep(0.02)
    os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return seconds, peak / 2**20


# Fully sharded, in bfloat16; nothing is written.
LOAD = """
import sys
from lemur_jax.cluster.hosts import choose_platform
choose_platform(8)
import jax
from lemur_jax.convert.source import open_source
from lemur_jax.infer.session import abstract_params
from lemur_jax.parallel.mesh import make_mesh, parse_mesh
source = open_source(sys.argv[1])
jax.block_until_ready(source.restore(abstract_params(source.model, make_mesh(parse_mesh("")), "bfloat16")))
"""


def same(left: pathlib.Path, right: pathlib.Path) -> bool:
    """Whether two directories hold the same tensors, bit for bit."""
    first, second = open_weights(left), open_weights(right)
    return first.keys() == second.keys() and all(
        np.array_equal(first[name].read().view(np.uint16), second[name].read().view(np.uint16))
        for name in first
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="default: the preset's")
    parser.add_argument("--directory", required=True, help="for the files; emptied before and after")
    parser.add_argument("--keep", action="store_true", help="reuse an existing model, and keep it")
    parser.add_argument("--load", action="store_true", help="also measure loading onto devices")
    arguments = parser.parse_args()
    config = preset(arguments.preset, **({"num_hidden_layers": arguments.layers} if arguments.layers else {}))
    root = pathlib.Path(arguments.directory)
    source, *results = (root / name for name in ("hf", "copy", "checkpoint", "out"))
    copy, checkpoint, out = results
    for path in results if arguments.keep else [root]:
        shutil.rmtree(path, ignore_errors=True)
    if not source.exists():
        make_model(source, config)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{arguments.preset}, {config.num_hidden_layers} layers: {size / 1e9:.2f} GB in bfloat16")
    lemur = [sys.executable, "-m", "lemur_jax"]
    jobs = [
        ("cp", ["cp", "-r", str(source), str(copy)]),
        ("import-hf", [*lemur, "import-hf", str(source), str(checkpoint), "--dtype", "bfloat16"]),
        ("export-hf", [*lemur, "export-hf", str(checkpoint), str(out), "--dtype", "bfloat16"]),
        *([("load", [sys.executable, "-c", LOAD, str(source)])] if arguments.load else []),
        ("cp again", ["cp", "-r", str(source), str(copy)]),
    ]
    rates = {}
    for name, words in jobs:
        for path in (copy, checkpoint) if name == "cp again" else (copy,):  # at most three copies on the disk
            shutil.rmtree(path, ignore_errors=True)
        seconds, peak = timed(words)
        rates[name] = size / seconds / 1e9
        print(f"{name:10} {seconds:7.1f} s  {rates[name]:6.3f} GB/s  peak {peak:5.2f} GiB", flush=True)
    cp = max(rates["cp"], rates["cp again"])
    ratios = (f"{name} {rate / cp:.0%}" for name, rate in rates.items() if not name.startswith("cp"))
    print("speed relative to the better cp:", ", ".join(ratios))
    print("bit-exact:", same(source, out))
    for path in results if arguments.keep else [root]:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
