"""Preparing on a Beam runner: its workers read, clean and tokenize with the functions of the local path.

Each input shard becomes a file of results on storage that all workers can write (a shared disk, gs://). The starting
process then reads the results in the order of the shards, so that duplicates, rejects and the store are the same as
without Beam. A shard whose file exists is not processed again.
"""

import contextlib
import dataclasses
import functools
import pickle
import uuid
from collections.abc import Iterator, Sequence

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.prepare import tasks
from lemur_jax.prepare.encoding import Results, encode
from lemur_jax.text.config import TokenizerConfig
from lemur_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The work on one split of a task."""

    task: str  # its name
    modules: tuple[str, ...]  # which a worker imports to find the task
    split: str
    shards: int  # of the split
    steps: str  # from `cleaning.parse_steps`
    tokenizer: TokenizerConfig  # its directory and template, which workers read
    folder: str  # for the files of results; its name must change with their inputs
    first_shard: int

    def file(self, shard: int) -> epath.Path:
        return epath.Path(self.folder) / f"{shard:06d}.pickle"

    def records(self, shard: int) -> Iterator[dict[str, bytes]]:
        return tasks.examples(tasks.find_task(self.task, self.modules), self.split, shard, self.shards)


def results(job: Job, runner: str, options: Sequence[str]) -> Results:
    """The results of `encoding.encoder` for the records of a split, with a None after each of several shards.

    `runner` is e.g. "DirectRunner", with options of its pipeline such as "--region=europe-west4". Raises UserError if
    Beam is not installed, or does not know the runner.
    """
    shards = range(job.first_shard, job.shards)
    missing = [shard for shard in shards if not job.file(shard).exists()]
    if missing:
        epath.Path(job.folder).mkdir(parents=True, exist_ok=True)
        _run_pipeline(job, missing, runner, options)
    for shard in shards:
        with job.file(shard).open("rb") as file, contextlib.suppress(EOFError):
            while True:
                yield pickle.load(file)
        if job.shards > 1:
            yield None


def _run_pipeline(job: Job, missing: Sequence[int], runner: str, options: Sequence[str]) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError('a Beam runner needs Apache Beam: pip install "lemur_jax[beam]"') from error
    try:
        pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(list(options)))
    except ValueError as error:
        raise UserError(f"Beam cannot use the runner {runner!r}: {error}") from error
    with pipeline:
        _ = pipeline | beam.Create(missing) | beam.Reshuffle() | beam.Map(encode_shard, job)


def encode_shard(shard: int, job: Job) -> None:
    """Writes the results of one shard; the file is renamed when it is complete."""
    tokenizer = _tokenizer(job.tokenizer)
    temporary = epath.Path(job.folder) / f".{shard}.{uuid.uuid4().hex}"
    with temporary.open("wb") as file:
        for record in job.records(shard):
            pickle.dump(encode(tokenizer, record, job.steps), file)
    temporary.replace(job.file(shard))


@functools.lru_cache(maxsize=1)
def _tokenizer(options: TokenizerConfig) -> Tokenizer:
    """Loaded once by each worker."""
    return Tokenizer.from_config(options)
