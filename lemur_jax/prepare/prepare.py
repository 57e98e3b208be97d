"""`lemur prepare`: seqio tasks to token stores, once.

First the tokenizer, then one store after the other, then the budget. A complete store that was made from the same
data by the same task and tokenizer is kept.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.cluster.lock import workdir_lock
from lemur_jax.common.cores import available_cores
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.json_files import digest_of, write_json
from lemur_jax.common.paths import is_refused_by_store
from lemur_jax.common.progress import Progress
from lemur_jax.config import RunConfig
from lemur_jax.data.budget import budget, check_budget, format_budget
from lemur_jax.data.config import DataConfig
from lemur_jax.data.counts import record_counts
from lemur_jax.data.manifest import Manifest, read_manifest
from lemur_jax.data.mixture import open_mixture
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare import beam, duplicates, tasks
from lemur_jax.prepare.cleaning import NO_STEPS, Removed, check_fields, parse_steps
from lemur_jax.prepare.code_layout import check_content, check_tokens
from lemur_jax.prepare.digests import input_digest, task_digest
from lemur_jax.prepare.encoding import BadRecord, Encode, Records, Result, Results, encoder
from lemur_jax.prepare.mixtures import resolve_mixture
from lemur_jax.prepare.parts import check_part, copy_part, split_name
from lemur_jax.prepare.prepare_tokenizer import prepare_tokenizer
from lemur_jax.prepare.rejects import Rejects
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text.chat_template import chat_template, check_template
from lemur_jax.text.tokenizer import Tokenizer, compatible
from lemur_jax.train.config import TrainConfig

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # the work that a kill may lose; checked every SAVE_RECORDS records of a shard
SAVE_RECORDS = 1000
VERIFIED_TOKENS = 1 << 28  # finished stores up to this size are read and checked from end to end


def prepare(
    config: RunConfig, *, replace: bool = False, runner: str = "", runner_options: Sequence[str] = ()
) -> None:
    """Makes the tokenizer and the token stores of a config that do not exist yet.

    The stores: train splits of `data.sources`, validation splits of `eval.tasks` and `prepare.held_out_tasks`. Logs a
    line per store and the budget table. After an error, Ctrl-C or a kill, the same command continues.

    Args:
      config: a run config.
      replace: whether stores that were made from other data, steps or tokenizer may be replaced.
      runner: a Beam runner that reads and tokenizes, e.g. "DirectRunner"; "": processes of this machine.
      runner_options: options of its pipeline, e.g. ["--region=europe-west4"].

    Raises:
      UserError: an unknown task, an empty or unreadable corpus, too many bad records, a tokenizer that does not
        fit, a store that would be replaced, or a budget that the finished stores cannot meet.
    """
    if config.data.mixture:
        config = dataclasses.replace(config, data=resolve_mixture(config.data))
    train = [(name, "train") for name in config.data.sources]
    held_out = [(name, "validation") for name in (*config.eval.tasks, *config.prepare.held_out_tasks)]
    stores = list(dict.fromkeys(train + held_out))
    task_by_name = {name: tasks.find_task(split_name(name)[0], config.data.modules) for name, _ in stores}
    steps = _steps(config.prepare.steps, {task.name for task in task_by_name.values()})
    for name, split in stores:
        task = task_by_name[name]
        check_part(name, split, list(config.data.sources), json.loads(steps[task.name]))
        _check_task(task, split, json.loads(steps[task.name]))
    tokenizer = prepare_tokenizer(config.tokenizer, config.data.modules, config.model.vocab_size)
    if any(tasks.content_of(task_by_name[name], split) != "text" for name, split in stores):
        check_template(tokenizer)
    if not stores:
        return
    with _lock(config.data), encoder(tokenizer, config.prepare.workers or available_cores()) as encode:
        run = _Run(
            config=config, steps=steps, tokenizer=tokenizer, encode=encode, replace=replace, runner=runner,
            runner_options=runner_options,
        )  # fmt: skip
        for name, split in () if replace else stores:
            _check_unchanged(run, task_by_name[name], name, split)
        for name, split in stores:
            if name == task_by_name[name].name:
                _prepare_store(run, task_by_name[name], split)
            else:
                _prepare_part(run, task_by_name[name], name, split)
    if config.data.mixture:
        sources = {name: dataclasses.asdict(source) for name, source in config.data.sources.items()}
        write_json(config.data.mixture_record, sources)  # where `config.load` finds them without seqio
    if not config.data.sources:
        return
    if config.data.by_epochs or config.train.batch_documents:
        record_counts(config.data, tokenizer)
        config = config.with_counts()
        size = f"{config.train.batch_rows:,} rows, {config.train.steps:,} updates"
        logger.info("%s, from the counts in %s", size, config.data.counts_record)
    _check_enough(config.data, config.train, config.seed, tokenizer)


def _check_task(task: Any, split: str, options: Mapping[str, Any]) -> None:
    """Refuses steps that do not fit what a task reads, before anything is read."""
    tasks.check_files(task, split)
    check_content(options, tasks.content_of(task, split), task.name)
    if (fields := tasks.metadata_of(task)) is not None:
        check_fields(task.name, options, fields)


@contextlib.contextmanager
def _lock(data: DataConfig) -> Iterator[None]:
    """Waits until no other `lemur prepare` writes to the stores: each would remove the other's unfinished ones."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(workdir_lock(epath.Path(data.stores), math.inf, "lemur prepare"))
        except Exception as error:  # the stores of a directory that cannot be written may be complete
            if not (isinstance(error, OSError) or is_refused_by_store(error)):
                raise
            logger.warning("%s cannot be locked (%s): start no second prepare", data.stores, reason_of(error))
        yield


def _check_enough(data: DataConfig, train: TrainConfig, seed: int, tokenizer: Tokenizer) -> None:
    """Logs how much of the stores a run reads; UserError: more than it may."""
    mixture = open_mixture(data, tokenizer, seed=seed, batch_rows=train.batch_rows)
    needs = budget(mixture, train.steps)
    logger.info("%s", format_budget(needs))
    check_budget(needs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the stores of one config share; `steps`: by task, from `parse_steps`."""

    config: RunConfig
    steps: Mapping[str, str]
    tokenizer: Tokenizer
    encode: Encode
    replace: bool
    runner: str
    runner_options: Sequence[str]

    def path(self, name: str, split: str) -> epath.Path:
        return epath.Path(self.config.data.stores) / name / split


def _prepare_store(run: _Run, task: tasks.Task, split: str) -> None:
    path = run.path(task.name, split)
    steps = run.steps[task.name]
    writer = _writer(run, task, split)
    if _is_current(run, path, writer):
        _remove_leftovers(path)  # of a run that was killed just after the store was complete
        return
    begin = time.monotonic()
    if fingerprints := duplicates.fingerprint_arrays(steps):
        draft = _writer(run, task, split, draft=fingerprints)
        with draft:
            rejects = _fill(run, task, split, draft)
            label = f"{task.name}/{split}: duplicates"
            with Progress(draft.documents, label, "documents") as progress, writer:
                duplicates.copy_distinct(draft, writer, steps, run.tokenizer, rejects, progress.update)
                rejects.finish()
    else:
        with writer:
            rejects = _fill(run, task, split, writer)
            rejects.finish()
    _remove_leftovers(path)
    seconds = time.monotonic() - begin
    logger.info("%s; %s%.1f s", _summary(read_manifest(path)), rejects.summary(), seconds)


def _fill(run: _Run, task: tasks.Task, split: str, writer: StoreWriter) -> Rejects:
    """Adds the documents that the filters keep to a store or its draft, from the last save on."""
    label = f"{task.name}/{split}"
    saved = writer.saved or {"place": (0, 0), "rejects": None}
    rejects = Rejects(run.path(task.name, split), saved["rejects"])
    (shard, done), last_save = saved["place"], time.monotonic()
    try:
        with Progress(task.source.num_input_examples(split), label, "documents") as progress:
            progress.update(rejects.records)
            for result in _results(run, task, split, writer, (shard, done)):
                if result is None:
                    shard, done = shard + 1, 0
                else:
                    done += 1
                    progress.update()
                    _add_result(result, writer, rejects)
                if done % SAVE_RECORDS == 0 and time.monotonic() - last_save >= SAVE_SECONDS:
                    rejects.check(run.config.prepare.max_bad_share, label, finished=False)
                    writer.save({"place": (shard, done), "rejects": rejects.save()})
                    last_save = time.monotonic()
        if rejects.records:
            rejects.check(run.config.prepare.max_bad_share, label, finished=True)
        _check_any(task, split, rejects, writer)
        if writer.is_draft:
            writer.save({"place": (tasks.count_shards(task, split), 0), "rejects": rejects.save()})
    except BaseException:
        rejects.close(keep=writer.saved is not None)
        raise
    return rejects


def _prepare_part(run: _Run, task: tasks.Task, name: str, split: str) -> None:
    """Copies the documents with one label from the task's store."""
    path = run.path(name, split)
    writer = _writer(run, task, split, part=name)
    if _is_current(run, path, writer):
        return
    _prepare_store(run, task, split)
    begin = time.monotonic()
    with writer:
        copy_part(TokenStore.open(run.path(task.name, split)), split_name(name)[1], writer)
    logger.info("%s; %.1f s", _summary(read_manifest(path)), time.monotonic() - begin)


def _results(
    run: _Run, task: tasks.Task, split: str, writer: StoreWriter, position: tuple[int, int]
) -> Results:
    """The results of the records from `position` = (shard, records of it) on, in order."""
    steps = run.steps[task.name]
    shard, done = position
    if not run.runner:
        return run.encode(_records(task, split, shard, done), steps)
    inputs = digest_of(dataclasses.asdict(writer.manifest))
    job = beam.Job(
        task=task.name,
        modules=tuple(run.config.data.modules),
        split=split,
        shards=tasks.count_shards(task, split),
        steps=steps,
        tokenizer=run.config.tokenizer,
        folder=str(run.path(task.name, f".{split}.beam") / inputs[:16]),
        first_shard=shard,
    )
    return itertools.islice(beam.results(job, run.runner, run.runner_options), done, None)


def _remove_leftovers(store: epath.Path) -> None:
    for kind in ("beam", "draft", "partial", "work"):
        (store.parent / f".{store.name}.{kind}").rmtree(missing_ok=True)


def _records(task: tasks.Task, split: str, first_shard: int, done: int) -> Records:
    """The records of a split without the first `done` of the first shard; a None after each of several shards."""
    shards = tasks.count_shards(task, split)
    for shard in range(first_shard, shards):
        yield from itertools.islice(tasks.examples(task, split, shard, shards), done, None)
        done = 0
        if shards > 1:
            yield None


def _add_result(result: Result, writer: StoreWriter, rejects: Rejects) -> None:
    if isinstance(result, BadRecord):
        rejects.add_bad(result)
    elif isinstance(result, Removed):
        rejects.remove(result)
    else:
        writer.add(result.tokens, result.id, result.n_bytes, result.mask, result.label)
        if writer.is_draft:
            duplicates.append_fingerprint(writer, result)
        rejects.keep()


def _check_any(task: tasks.Task, split: str, rejects: Rejects, writer: StoreWriter) -> None:
    if not rejects.records:
        raise UserError(
            f"task {task.name!r} has no documents in its {split} split: look at its source, and at its `held_out`"
        )
    if not writer.documents:
        raise UserError(
            f"every document of task {task.name!r} in its {split} split is removed ({rejects.summary()[:-2]}): look at"
            f" prepare.steps.{task.name}, and at the field that its text is read from"
        )


def _steps(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The steps of each task, from `parse_steps`."""
    names = sorted(names)
    for name in options:
        if name not in names:
            raise UserError(f"prepare.steps names {name!r}; the tasks of this config are {', '.join(names)}")
    return {name: parse_steps(name, options.get(name, {})) for name in names}


def _writer(
    run: _Run, task: tasks.Task, split: str, part: str = "", draft: Mapping[str, str] | None = None
) -> StoreWriter:
    """The writer of a task's store, of a part of it, or of its draft."""
    tokenizer, steps = run.tokenizer, run.steps[task.name]
    content = tasks.content_of(task, split)
    is_chat = content != "text"
    has_control_tokens = is_chat or check_tokens(json.loads(steps), tokenizer, task.name)
    # Plain text gives no control tokens, so that a tokenizer without them can read it.
    absent = () if has_control_tokens else tokenizer.control_tokens
    definition = task_digest(task) + steps * (steps != NO_STEPS)
    definition += (chat_template(tokenizer) if is_chat else "") + part
    if not is_chat and tokenizer.separators != ([tokenizer.bos_id], [tokenizer.eos_id]):
        definition += json.dumps(tokenizer.separators)  # bos and eos were earlier versions' rule
    manifest = Manifest(
        task=part or task.name,
        split=split,
        source=task.name,
        tokenizer_digest=tokenizer.digest,
        added_tokens={token: id for token, id in tokenizer.added_tokens.items() if token not in absent},
        vocab_size=tokenizer.vocab_size,
        has_loss_mask=is_chat,
        preferences=content == "preferences",
        task_digest=hashlib.sha256(definition.encode()).hexdigest(),
        input_digest=input_digest(task, split),
        label_field="" if part else json.loads(steps).get("label", {}).get("field", ""),
    )
    return StoreWriter(run.path(part or task.name, split), manifest, draft)


def _check_unchanged(run: _Run, task: tasks.Task, name: str, split: str) -> None:
    """Raises UserError if a complete store would be replaced: runs that read it could not continue.

    A part that is not there is copied from the store of its whole task, which is made first if that changed.
    """
    path = run.path(name, split)
    manifest = _manifest(path)
    part = name if name != task.name else ""
    if part and manifest is None:
        return _check_unchanged(run, task, task.name, split)
    changed = _changes(manifest, _writer(run, task, split, part), run.tokenizer) if manifest else []
    if changed:
        raise UserError(
            f"{path} was made before {' and '.join(changed)} of the task {task.name} changed, and runs that read"
            " it could not continue with another: prepare into another data.stores, or add --replace"
        )


def _changes(manifest: Manifest, writer: StoreWriter, tokenizer: Tokenizer) -> list[str]:
    """What differs between a store and the one that `writer` would write."""
    new = writer.manifest
    changed = {
        "the input": manifest.input_digest != new.input_digest,
        "the definition, steps or template": manifest.task_digest != new.task_digest,
        "the tokenizer": not compatible(tokenizer, manifest.tokenizer_digest, manifest.added_tokens),
    }
    return [label for label, differs in changed.items() if differs]


def _is_current(run: _Run, path: epath.Path, writer: StoreWriter) -> bool:
    """Whether the store at `path` is intact and the one that `writer` would write; logs so."""
    if not path.exists():
        return False
    if not any((path / name).exists() for name in ("manifest.json", "tokens")) and any(path.iterdir()):
        raise UserError(f"{path} is no token store but has files in it: point data.stores somewhere else")
    manifest = _manifest(path)
    if manifest is None or _changes(manifest, writer, run.tokenizer):
        return False
    try:
        store = TokenStore.open(path)
        if manifest.tokens <= VERIFIED_TOKENS:
            store.verify()
    except UserError as error:
        if run.replace:
            return False
        raise UserError(f"{path} is damaged; add --replace to make it again: {error}") from error
    logger.info("%s; unchanged", _summary(manifest))
    return True


def _manifest(path: epath.Path) -> Manifest | None:
    """The manifest of a complete store with documents; None for an unfinished one or another format."""
    try:
        manifest = read_manifest(path)
    except (UserError, ValueError, TypeError):
        return None
    return manifest if manifest.documents else None


def _summary(manifest: Manifest) -> str:
    parts = [f"{manifest.documents:,} documents", f"{manifest.tokens:,} tokens"]
    if manifest.has_loss_mask:
        parts.append(f"{manifest.supervised_tokens / manifest.tokens:.0%} of them supervised")
    parts.append(f"{manifest.bytes / max(manifest.supervised_tokens, 1):.2f} bytes a target")
    return f"{manifest.task}/{manifest.split}: {', '.join(parts)}"
