"""Measures the search for duplicates in corpora of several sizes: disk, memory and time.

    python benchmarks/duplicates.py

Fingerprints are generated: of every 20 documents one is an exact copy of an earlier one, and two have 85% of its
MinHashes; one in 50 shares a band with many others, like documents with the same licence. Fingerprinting
is part of cleaning, which `benchmarks/prepare.py` measures. Each size runs in its own process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from lemur_jax.data.arrays import ArrayWriter, open_array
from lemur_jax.prepare import duplicates
from lemur_jax.prepare.cleaning import parse_steps

BLOCK = 1 << 14


def write(folder: Path, documents: int, steps: str) -> None:
    rng = np.random.default_rng(0)
    arrays = duplicates.fingerprint_arrays(steps)
    writers = {name: ArrayWriter(folder / name, arrays[name]) for name in ("digests", "minhashes")}
    common = rng.integers(1 << 16, size=4, dtype=np.uint16)
    for first in range(0, documents, BLOCK):
        count = min(BLOCK, documents - first)
        digests = rng.integers(1 << 63, size=(count, 2), dtype=np.uint64)
        minhashes = rng.integers(1 << 16, size=(count, 128), dtype=np.uint16)
        minhashes[::50, :4] = common
        copies = np.arange(20, count, 20)
        digests[copies], minhashes[copies] = digests[copies - 7], minhashes[copies - 7]
        for place in (5, 15):
            near = np.arange(20 + place, count, 20)
            same = rng.random((len(near), 128)) < 0.85
            minhashes[near] = np.where(same, minhashes[near - 3], minhashes[near])
        writers["digests"].append(digests.ravel())
        writers["minhashes"].append(minhashes.ravel())
    for writer in writers.values():
        writer.close()


def size(folder: Path) -> int:
    """Bytes of the files in a folder, without those that vanish meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def watch(folder: Path, peaks: dict[str, int], done: threading.Event) -> None:
    """Records the peak of disk use (bytes) and of memory without mapped files (KiB)."""
    while not done.wait(0.2):
        lines = Path("/proc/self/status").read_text().splitlines()
        memory = int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
        peaks["memory"] = max(peaks["memory"], memory)
        peaks["disk"] = max(peaks["disk"], size(folder))


def measure(documents: int, folder: Path) -> None:
    steps = parse_steps("made up", {"exact_duplicates": {}, "near_duplicates": {}})
    (folder / "scratch").mkdir()
    arrays = {name: open_array(folder / name, cache=False).result() for name in ("digests", "minhashes")}
    peaks, done = {"memory": 0, "disk": 0}, threading.Event()
    watching = threading.Thread(target=watch, args=(folder, peaks, done))
    watching.start()
    begin = time.monotonic()
    found = duplicates.find_duplicates(arrays, json.loads(steps), documents, folder / "scratch")
    seconds = time.monotonic() - begin
    done.set()
    watching.join()
    removed = ", ".join(f"{np.count_nonzero(earlier >= 0):,} by {step}" for step, earlier in found.items())
    print(
        f"{documents:>10,} documents: {documents / seconds:8,.0f} per second, {peaks['disk'] / documents:5.0f} bytes"
        f" per document on disk, {peaks['memory'] >> 10:,} MiB of memory; removed {removed}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--documents", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000, 4_000_000]
    )
    parser.add_argument("--measure", nargs=2, metavar=("DOCUMENTS", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(int(args.measure[0]), Path(args.measure[1]))
        return
    steps = parse_steps("made up", {"exact_duplicates": {}, "near_duplicates": {}})
    for documents in args.documents:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), documents, steps)
            command = [sys.executable, __file__, "--measure", str(documents), folder]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
