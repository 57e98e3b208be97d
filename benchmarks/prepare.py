"""Preparing: megabytes a second of `prepare` against the bare tokenizer in as many processes.

    python benchmarks/prepare.py

The corpus is Python's standard library as JSON Lines, several times over; the tokenizer a SentencePiece
BPE of 8,000 pieces trained on a part of it. Both sides include starting their processes.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lemur_jax.common.config import default_config
from lemur_jax.data import stdlib
from lemur_jax.data.documents import CHUNK_BYTES, available_cores
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.data.tokenizer_files import train_sentencepiece
from lemur_jax.models.presets import preset

CLEANING = {
    "length": {"min_chars": 100},
    "lines": {"max_chars": 10_000},
    "alphanumeric": {"min_share": 0.25},
    "decontaminate": {"against": ("human_eval",)},
    "exact_duplicates": {},
    "near_duplicates": {},
}


def write_corpus(folder: Path, copies: int) -> tuple[list[str], int]:
    """JSON Lines, one file a copy, and the texts of one copy; copies differ by a line, not to be equal."""
    texts = [stdlib.read_source(path) for _, path in stdlib.files()]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    n_bytes = 0
    for copy in range(copies):
        with (folder / f"{copy}.jsonl").open("w") as file:
            for text in texts:
                text = f"# {copy}\n{text}"
                n_bytes += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
    return texts, n_bytes


def start(path: str) -> None:
    global tokenizer
    tokenizer = Tokenizer.load(path)


def encode(texts: list[str]) -> int:
    return sum(len(tokenizer.encode(text)) for text in texts)


@contextlib.contextmanager
def measured(n_bytes: int, label: str) -> Iterator[None]:
    """Prints speed, and processor time, which other work on the machine disturbs less."""

    def used() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))

    begin, before = time.monotonic(), used()
    yield
    seconds, processor = time.monotonic() - begin, used() - before
    speeds = f"{n_bytes / seconds / 1e6:5.2f} MB/s, {n_bytes / processor / 1e6:5.2f} MB a processor second"
    print(f"{label:<18}{speeds}", flush=True)


def bare(path: Path, texts: list[str], copies: int, workers: int) -> None:
    """Processes that do nothing but tokenize texts handed to them."""
    chunks, chunk, size = [], [], 0
    for copy in range(copies):
        for text in texts:
            chunk.append(f"# {copy}\n{text}")
            size += len(text)
            if size > CHUNK_BYTES:
                chunks.append(chunk)
                chunk, size = [], 0
    pool = multiprocessing.get_context("spawn").Pool(workers, start, (str(path),))
    sum(pool.imap(encode, [*chunks, chunk]))
    pool.close()
    pool.join()


def watch_workers(peaks: dict[int, int], done: threading.Event) -> None:
    """Notes the largest resident memory (KiB) of each child process so far, again and again."""
    while not done.wait(0.2):
        for child in multiprocessing.active_children():
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                line = next(line for line in lines if line.startswith("VmHWM"))
                peaks[child.pid] = int(line.split()[1])


def prepared(name: str, folder: Path, tokenizer_path: Path, steps: dict, workers: int) -> None:
    from lemur_jax.data import tasks
    from lemur_jax.data.prepare import prepare

    tasks.add_files(name, str(folder))
    config = default_config(preset("quickstart", vocab_size=8_000).to_dict())
    config.tokenizer.path = str(tokenizer_path)
    config.data.stores = str(tokenizer_path.parent / "stores")
    config.data.sources = {name: {"share": 1.0, "packing": "concat", "max_epochs": 0.0}}
    config.prepare.workers = workers
    config.prepare.steps = {name: steps}
    config.train.steps = 1
    prepare(config, say=lambda line: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--copies", type=int, default=3, help="of the standard library, some 30 MB each")
    parser.add_argument("--workers", type=int, default=available_cores())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "corpus").mkdir()
        texts, n_bytes = write_corpus(root / "corpus", args.copies)
        train_sentencepiece(texts[::10], root / "tokenizer", 8_000)
        print(f"{n_bytes / 1e6:.0f} MB, {args.workers} workers")
        from lemur_jax.data import prepare  # noqa: F401  (TensorFlow starts outside of what is measured)

        # The bare tokenizer before and after each: other work on the machine shows in the difference.
        arguments = (root / "tokenizer", texts, args.copies, args.workers)
        with measured(n_bytes, "bare tokenizer"):
            bare(*arguments)
        for name, steps in (("plain", {}), ("cleaned", CLEANING)):
            peaks: dict[int, int] = {}
            done = threading.Event()
            threading.Thread(target=watch_workers, args=(peaks, done), daemon=True).start()
            with measured(n_bytes, f"prepare, {name}"):
                prepared(name, root / "corpus", root / "tokenizer", steps, args.workers)
            done.set()
            with measured(n_bytes, "bare tokenizer"):
                bare(*arguments)
            print(f"  the largest worker of {name}: {max(peaks.values()) / 1024:,.0f} MiB", flush=True)
        parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"the parent, with TensorFlow and a copy of the corpus: {parent:,.0f} MiB")


if __name__ == "__main__":
    main()
