"""Measures the loader: batches per second from a local store, peak memory, and the time to start at a late step.

    python benchmarks/data.py

Each case runs in its own process, on one CPU device. The stores hold generated documents with log-normal lengths: code
for `concat`, conversations for `fit`, and many very short documents. Memory must not grow with the number of documents.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from lemur_jax.data.inspect import histogram
from lemur_jax.data.manifest import Manifest
from lemur_jax.data.mixture import PACKINGS, Mixture, Source
from lemur_jax.data.rows import Rows
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare.store_writer import StoreWriter

LENGTH = 4096
ROWS = 32
# name -> packing, median length, spread (of the logarithm), whether there is a loss mask
SHAPES = {
    "code": ("concat", 700, 1.3, False),
    "chat": ("fit", 450, 0.8, True),
    "short chat": ("fit", 60, 0.8, True),
}


def lengths_of(shape: str, tokens: int) -> np.ndarray:
    _, median, spread, _ = SHAPES[shape]
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(median), spread, 2 * tokens // median).astype(int).clip(8, 200_000)
    return lengths[: np.searchsorted(np.cumsum(lengths), tokens)]


def write(path: str, shape: str, tokens: int) -> None:
    rng = np.random.default_rng(1)
    _, _, _, masked = SHAPES[shape]
    fields = {
        "task": shape,
        "split": "train",
        "source": "made up",
        "tokenizer_digest": "",
        "added_tokens": {},
    }
    # Ids follow Zipf's law, as in text: uniform ids would not compress, and cost more to read.
    ids = rng.zipf(1.2, 1 << 22) % 32_000
    with StoreWriter(path, Manifest(vocab_size=32_000, has_loss_mask=masked, **fields)) as writer:
        for index, length in enumerate(lengths_of(shape, tokens).tolist()):
            start = int(rng.integers(len(ids) - length))
            mask = np.arange(length) % 400 > 150 if masked else None
            writer.add(ids[start : start + length], str(index), 4 * length, mask)


def open_rows(path: str, shape: str) -> Rows:
    return PACKINGS[SHAPES[shape][0]](TokenStore.open(path), LENGTH)


def peak() -> str:
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB"


def pack(path: str, shape: str) -> None:
    """Opens the store for the first time, as `lemur prepare` does."""
    begin = time.monotonic()
    open_rows(path, shape)
    print(f"{shape}: first opened in {time.monotonic() - begin:.2f} s, {peak()}", flush=True)


def read(path: str, shape: str, seconds: float, step: int) -> None:
    """Opens the store, makes batches from `step` on, and prints what that took."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from lemur_jax.data.loader import Loader

    jax.devices()
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    begin = time.monotonic()
    rows = open_rows(path, shape)
    mixture = Mixture([Source(name=shape, rows=rows, share=1.0)], 42, ROWS)
    loader = Loader(mixture, sharding)
    jax.block_until_ready(loader.batch(step))
    started = time.monotonic() - begin
    begin, count = time.monotonic(), 0
    for _, batch in loader.iterate(step + 1, step + 1_000_000):
        jax.block_until_ready(batch)
        count += 1
        if time.monotonic() - begin > seconds:
            break
    speed = count * ROWS * rows.tokens_per_row / (time.monotonic() - begin)
    print(
        f"{shape:<10} from step {step:>9,}: {speed / 1e6:6.1f} M tokens/s, first batch after {started:.2f} s,"
        f" padding {1 - rows.tokens_per_row / LENGTH:.2%}, {peak()}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of each store")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of reading per case")
    parser.add_argument("--read", nargs=3, metavar=("PATH", "SHAPE", "STEP"), help=argparse.SUPPRESS)
    parser.add_argument("--pack", nargs=2, metavar=("PATH", "SHAPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        path, shape, step = args.read
        read(path, shape, args.seconds, int(step))
        return
    if args.pack:
        pack(*args.pack)
        return
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            path = f"{folder}/{shape}"
            write(path, shape, args.tokens)
            lengths = lengths_of(shape, args.tokens)
            print(f"{shape}: {len(lengths):,} documents, {lengths.sum():,} tokens; lengths")
            print("\n".join(histogram(lengths)), flush=True)
            cases = [["--read", path, shape, str(step)] for step in (0, 1_000_000)]
            for words in (["--pack", path, shape], *cases):
                command = [sys.executable, __file__, "--seconds", str(args.seconds), *words]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
