"""Compares the speed of `prepare` with the bare tokenizer in as many processes.

    python benchmarks/prepare.py

The corpus is several copies of Python's standard library as JSON Lines; the tokenizer is a SentencePiece BPE of 8,000
pieces trained on a part of it. Each case runs in its own process. Both sides include the start of their workers, but
not the import of TensorFlow.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from lemur_jax.common.cores import available_cores
from lemur_jax.config import default_config, from_config_dict
from lemur_jax.models.presets import preset
from lemur_jax.prepare.encoding import CHUNK_BYTES
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import train_sentencepiece

CLEANING = {
    "length": {"min_chars": 100},
    "lines": {"max_chars": 10_000},
    "alphanumeric": {"min_share": 0.25},
    "decontaminate": {"against": ("human_eval",)},
    "exact_duplicates": {},
    "near_duplicates": {},
}


def texts_of(copy: int) -> Iterator[str]:
    """The files of the standard library; a first line makes copies differ."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:
            if text := file.read().strip():
                yield f"# {copy}\n{text}"


def write_corpus(folder: Path, copies: int) -> int:
    """Writes JSON Lines, one file per copy; returns the bytes of text in each."""
    folder.mkdir()
    for copy in range(copies):
        with (folder / f"{copy}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts_of(copy))
    return sum(len(text.encode()) for text in texts_of(0))


def start(path: str) -> None:
    global tokenizer
    tokenizer = Tokenizer.load(path)


def encode(texts: list[str]) -> int:
    return sum(len(tokenizer.encode(text)) for text in texts)


def bare(root: Path, copies: int, workers: int) -> Callable[[], None]:
    """Tokenizes texts in processes that do nothing else."""
    chunks, chunk, size = [], [], 0
    for copy in range(copies):
        for text in texts_of(copy):
            chunk.append(text)
            size += len(text)
            if size > CHUNK_BYTES:
                chunks.append(chunk)
                chunk, size = [], 0

    def run() -> None:
        pool = multiprocessing.get_context("spawn").Pool(workers, start, (str(root / "tokenizer"),))
        sum(pool.imap(encode, [*chunks, chunk]))
        pool.close()
        pool.join()

    return run


def prepared(root: Path, copies: int, workers: int, steps: dict) -> Callable[[], None]:
    from lemur_jax.prepare import tasks
    from lemur_jax.prepare.prepare import prepare

    tasks.add_files("corpus", [str(root / "corpus" / f"{copy}.jsonl") for copy in range(copies)])
    config = default_config(preset("quickstart", vocab_size=8_000))
    config.tokenizer.path = str(root / "tokenizer")
    config.data.stores = tempfile.mkdtemp(dir=root)
    config.data.sources = {"corpus": {"share": 1.0, "packing": "concat", "max_epochs": 0.0}}
    config.prepare.workers = workers
    config.prepare.steps = {"corpus": steps}
    config.train.steps = 1
    return lambda: prepare(from_config_dict(config))


def used() -> float:
    """Processor seconds of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def watch_workers(peaks: dict[int, int], done: threading.Event) -> None:
    """Records the peak resident memory (KiB) of each child process.

    `ru_maxrss` of a child is at least what its parent had when it was started.
    """
    while not done.wait(0.2):
        for child in multiprocessing.active_children():
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                line = next(line for line in lines if line.startswith("VmHWM"))
                peaks[child.pid] = int(line.split()[1])


def measure(case: str, root: Path, copies: int, workers: int, n_bytes: int) -> None:
    """Runs a case and prints its speed, per second and per processor second, and its memory."""
    arguments = (root, copies, workers)
    run = bare(*arguments) if case == "bare" else prepared(*arguments, CLEANING if case == "cleaned" else {})
    peaks: dict[int, int] = {}
    done = threading.Event()
    threading.Thread(target=watch_workers, args=(peaks, done), daemon=True).start()
    begin, before = time.monotonic(), used()
    run()
    seconds, processor = time.monotonic() - begin, used() - before
    done.set()
    megabytes = copies * n_bytes / 1e6
    parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{case:<8}{megabytes:4.0f} MB: {megabytes / seconds:5.2f} MB/s,"
        f" {megabytes / processor:5.2f} MB per processor second;"
        f" largest worker {max(peaks.values()) >> 10:,} MiB, parent {parent >> 10:,} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--copies", type=int, default=3, help="copies of the standard library, some 30 MB each"
    )
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        case, root, copies, n_bytes = args.measure
        measure(case, Path(root), int(copies), args.workers, int(n_bytes))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        n_bytes = write_corpus(root / "corpus", args.copies)
        train_sentencepiece(itertools.islice(texts_of(0), 0, None, 10), root / "tokenizer", 8_000)
        print(f"{args.workers} workers", flush=True)
        # The bare tokenizer runs before and after each case: the difference shows other load on the machine.
        # A single copy at the end: compared with all of them, it shows memory that grows with the corpus.
        cases = [(case, args.copies) for case in ("bare", "plain", "bare", "cleaned", "bare")]
        for case, copies in cases + [("plain", 1), ("cleaned", 1)] * (args.copies > 1):
            words = ["--measure", case, temporary, str(copies), str(n_bytes)]
            command = [sys.executable, __file__, "--workers", str(args.workers), *words]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
