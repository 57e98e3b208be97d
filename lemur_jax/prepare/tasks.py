"""seqio tasks of files, of TFDS and of Python functions, and reading any task.

`prepare` reads tasks whose examples have a string feature `text`; or `messages`, JSON: a list of {"role", "content"} or
{"messages", "tools", "chat_template_kwargs"}; or `preferences`, JSON: `chosen` and `rejected`, each as `messages`, or
one of them. `id`, `source`, `meta` (JSON), `where` and `error` (JSON with a `reason`) are optional. Your own tasks are
ordinary seqio tasks, registered by a module of `config.data.modules`; `add_files` and its like make some.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.sections import did_you_mean
from lemur_jax.prepare import readers, streams
from lemur_jax.prepare.fields import Document, Fields, to_documents
from lemur_jax.prepare.files import Files
from lemur_jax.prepare.modules import import_modules
from lemur_jax.prepare.quiet_stderr import quiet_stderr

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    with quiet_stderr():  # TensorFlow writes to it before it reads its log level
        import pyarrow  # noqa: F401  # reports a missing one at once
        import seqio
        import tensorflow as tf
except ModuleNotFoundError as error:
    raise UserError(f"preparing data needs {error.name}: pip install 'lemur_jax[prepare]'") from error

Task: TypeAlias = seqio.Task
MixtureRegistry = seqio.MixtureRegistry
CONTENTS = ("messages", "preferences", "text")
_BESIDE_CONTENT = ("id", "meta", "where", "error")  # features of documents of `Fields`
FEATURES = (*CONTENTS, "source", *_BESIDE_CONTENT)

# TensorFlow only reads here; the accelerators are JAX's. It raises if it is already in use.
with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], "GPU")


class GeneratorSource(seqio.FunctionDataSource):
    """Documents of a Python function as a seqio source; arguments: see `add_generator`."""

    def __init__(
        self,
        documents: Callable[[str], Iterable[Mapping[str, str | bytes]]],
        content: str,
        splits: Sequence[str],
        fingerprint: Callable[[], str] | None = None,
    ):
        self._documents = documents
        self.content = content
        self.metadata: Sequence[str] = ()
        self._fingerprint = fingerprint
        super().__init__(dataset_fn=self._dataset, splits=splits)

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # documents come in a fixed order: rows are drawn from the store
        return _dataset_of(lambda: self._documents(split), self.content, "id")

    def documents(self, split: str, *_: int) -> Iterator[Document]:
        """The documents of a split, which is one shard; one without an id has its number."""
        for number, given in enumerate(self._documents(split) or ()):  # a function may return None
            what = f"document {number} of a function's {split} split"
            if not isinstance(given, Mapping):
                raise UserError(f"{what} is {given!r:.40}: it must be a mapping of strings")
            name = given.get("id") or f"{number:09d}"
            document: dict[str, Any] = {self.content: given.get(self.content), "id": name}
            for name, value in document.items():
                if not isinstance(value, str | bytes):
                    raise UserError(f"{name!r} of {what} is {value!r:.40}: it must be a string")
                document[name] = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
            yield document

    def fingerprint(self, split: str) -> str:
        """Changes with the documents; `digests.input_digest` calls it on any source that has it."""
        return self._fingerprint() if self._fingerprint else split


def _dataset_of(documents: Callable[[], Iterable[Mapping[str, Any]]], *features: str) -> tf.data.Dataset:
    """Documents of a Python function, with these string features."""
    signature = {name: tf.TensorSpec((), tf.string) for name in features}
    return tf.data.Dataset.from_generator(documents, output_signature=signature)


class FileSource(seqio.DataSource):
    """Files as a seqio source, one shard per file."""

    def __init__(self, files: Files):
        self._files = files
        self._listed: dict[str, Sequence[str]] = {}
        self.fields = files.fields
        self.content, self.metadata = files.fields.content, files.fields.meta
        super().__init__(splits=files.splits)

    def __repr__(self) -> str:
        # Earlier versions divided conversations by their JSON: a store of theirs and one of ours may share documents.
        by_text = ", held out by text" * (self._files.divides and self.content != "text")
        return f"{type(self).__name__}({self._files}{by_text})"

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def num_input_examples(self, split: str) -> None:
        return None

    def list_shards(self, split: str) -> Sequence[str]:
        return self._listed.get(split) or self.list_again(split)

    def list_again(self, split: str) -> Sequence[str]:
        """The files there are now, and until the next call those of the split, whose shards keep their numbers."""
        self._listed[split] = self._files.list(split)
        return self._listed[split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: Any,
    ) -> tf.data.Dataset:
        del shuffle, seed  # documents come in a fixed order: rows are drawn from the store
        shard, shards = (0, 1) if shard_info is None else (shard_info.index, shard_info.num_shards)
        return _dataset_of(lambda: self.documents(split, shard, shards), self.content, *_BESIDE_CONTENT)

    def documents(self, split: str, shard: int, shards: int) -> Iterator[Document]:
        """The documents of every `shards`-th file from number `shard` on."""
        files = self.list_shards(split)[shard::shards]
        return self._files.documents(split, files, _tfrecord_rows)


def _tfrecord_rows(file: str) -> readers.Rows:
    """The features of each tf.Example: a single value as itself, several as a list."""
    # TensorFlow does not report a gzip stream that ends early, so we decompress.
    plain = contextlib.nullcontext((file, None))
    with streams.decompressed_copy(file) if streams.compression_of(file) else plain as (path, damage):
        yield from readers.up_to_damage(file, _examples(path, damage))


def _examples(path: str, damage: streams.Unreadable | None) -> readers.Rows:
    number = size = 0
    try:
        for number, data in enumerate(tf.data.TFRecordDataset(path).as_numpy_iterator(), 1):
            size += len(data) + 16  # with its length and two checksums
            try:
                features = tf.train.Example.FromString(data).features.feature
            except Exception:  # protobuf's DecodeError, a class of its own in each implementation
                bad = readers.BadRow(reason="not a tf.Example", excerpt=data[: readers.EXCERPT])
                yield f"record {number}", bad
                continue
            lists = {
                key: list(getattr(value, value.WhichOneof("kind") or "bytes_list").value)
                for key, value in features.items()
            }
            yield f"record {number}", {k: v[0] if len(v) == 1 else v for k, v in lists.items()}
    except (tf.errors.DataLossError, tf.errors.OutOfRangeError) as error:
        said = re.search(r"\w+ record at \d+", str(error.message))
        reason = said[0] if said else str(error.message).partition("\n")[0]
        unread = epath.Path(path).stat().length / size - 1 if size and "corrupted" in reason else None
        damage = damage or streams.Unreadable(reason, unread)
    if not damage and size != epath.Path(path).stat().length:  # TensorFlow ends silently at half a length
        damage = streams.Unreadable("it ends within a record", 0.0)
    if damage:
        raise damage


def add_files(
    name: str,
    patterns: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    fields: Fields | None = None,
    *,
    kind: str = "",
    held_out: float = 0.0,
    max_bytes: int = readers.MAX_BYTES,
) -> seqio.Task:
    """Registers a task that reads files.

    Args:
      name: of the task.
      patterns: globs or directories, local, gs:// or hf://datasets/ORG/NAME[@REVISION]/; or a mapping from "train" and
        "validation" to them.
      fields: where in a row the document is.
      kind: a name in `readers.FORMATS`; "": by each file's name. Files in .gz, .zst, .bz2 and .xz are decompressed.
      held_out: share of documents in the validation split if `patterns` has none, chosen by a hash of the content (or
        of `group`), so that equal documents fall into the same split.
      max_bytes: longer lines, elements of arrays and text files are refused.
    """
    splits = patterns if isinstance(patterns, Mapping) else {"train": patterns}
    fields = fields or Fields()
    files = Files(patterns=dict(splits), fields=fields, kind=kind, held_out=held_out, max_bytes=max_bytes)
    return _add(name, FileSource(files), fields.content)


def _add(name: str, source: seqio.DataSource, content: str, preprocessors: Sequence[Any] = ()) -> seqio.Task:
    feature = seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=list(preprocessors),
        output_features={content: feature, "id": feature},
        metric_fns=[],
    )


def add_generator(
    name: str,
    documents: Callable[[str], Iterable[Mapping[str, str | bytes]]],
    *,
    content: str = "text",
    splits: Sequence[str] = ("train",),
    fingerprint: Callable[[], str] | None = None,
) -> seqio.Task:
    """Registers a task of documents that a Python function yields.

    Args:
      name: of the task.
      documents: from a split to its documents, always in the same order, with `content` and perhaps `id`.
      content: "text", "messages" or "preferences", as above.
      splits: names of the splits.
      fingerprint: its value changes with the documents; without one, `prepare` does not notice a change.
    """
    return _add(name, GeneratorSource(documents, content, splits, fingerprint), content)


def add_tfds(
    name: str,
    tfds_name: str | None = None,
    fields: Fields | None = None,
    *,
    splits: Mapping[str, str] | None = None,
    data_dir: str | None = None,
) -> seqio.Task:
    """Registers a task that reads a TFDS data set.

    Args:
      name: of the task.
      tfds_name: `name/config:version`; None: the only data set in `data_dir`.
      fields: where in an example the document is.
      splits: e.g. {"train": "train[1%:]", "validation": "train[:1%]"}; None: those of the data set.
      data_dir: its directory.
    """
    fields = fields or Fields()
    source = seqio.TfdsDataSource(
        tfds_name or "", tfds_data_dir=data_dir, splits=dict(splits) if splits else None, read_only=True
    )
    convert = functools.partial(_tfds_documents, name=name, fields=fields)
    return _add(name, source, fields.content, [convert])


def _tfds_documents(dataset: tf.data.Dataset, name: str, fields: Fields) -> tf.data.Dataset:
    """Examples of TFDS to documents; strings, numbers and lists of them, nested names joined by dots."""

    def documents() -> Iterator[Document]:
        examples = enumerate(dataset.as_numpy_iterator())
        rows = ((f"example {number}", dict(_flat(example))) for number, example in examples)
        return (document for document, _ in to_documents(name, rows, fields))

    return _dataset_of(documents, fields.content, *_BESIDE_CONTENT)


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(tree.items()):
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _as_lists(value)


def _as_lists(value: Any) -> Any:
    """An array, perhaps of arrays, as lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_as_lists(item) for item in value] if isinstance(value, list) else value


def find_task(name: str, modules: Sequence[str] = ()) -> seqio.Task:
    """The task with this name, after importing `modules`; UserError: there is none (the nearest is named)."""
    import_modules(modules)
    known = sorted(seqio.TaskRegistry.names())
    if name not in known:
        raise UserError(
            f"there is no seqio task {name!r}{did_you_mean(name, known)}; register it in a module of data.modules"
        )
    return seqio.TaskRegistry.get(name)


@contextlib.contextmanager
def _readable(task: seqio.Task, split: str) -> Iterator[None]:
    """Raises UserError if the task has no such split, or its files are missing or unreadable."""
    try:
        if split not in (splits := task.source.splits):
            raise UserError(f"task {task.name!r} has no split {split!r}; it has {', '.join(sorted(splits))}")
        yield
    except _UNREADABLE as error:
        message = str(getattr(error, "message", error)).strip().partition("\n")[0]
        raise UserError(f"cannot read the {split} split of task {task.name!r}: {message}") from error


def check_files(task: seqio.Task, split: str) -> None:
    """Raises UserError if the task has no such split, or its files are missing."""
    with _readable(task, split):
        getattr(task.source, "list_again", task.source.list_shards)(split)


def content_of(task: seqio.Task, split: str) -> str:
    """Which of `CONTENTS` a task has; UserError if it has none, or its files are missing."""
    if _is_read_directly(task):
        return task.source.content
    spec = _dataset(task, split, 0, 1).element_spec
    return next(name for name in CONTENTS if name in spec)


def metadata_of(task: seqio.Task) -> Sequence[str] | None:
    """The metadata fields that documents of a task have; None: not known before they are read."""
    return task.source.metadata if _is_read_directly(task) else None


def count_shards(task: seqio.Task, split: str) -> int:
    """The number of shards of a split that can be read separately."""
    source = task.source
    if source.supports_arbitrary_sharding or isinstance(source, seqio.FunctionDataSource):
        return 1
    return max(1, len(source.list_shards(split)))


def examples(task: seqio.Task, split: str, shard: int = 0, shards: int = 1) -> Iterator[dict[str, bytes]]:
    """The string features of each example of a split or of one shard, in a fixed order; a missing `id` is the number.

    Raises UserError for no such split, no text, a feature that is no scalar string, or an unreadable file.
    """
    with _readable(task, split):
        if _is_read_directly(task):
            yield from task.source.documents(split, shard, shards)
            return
        counts = shards > 1 and isinstance(task.source, seqio.TfdsDataSource)  # from 0 in each shard
        records = _dataset(task, split, shard, shards).prefetch(16).as_numpy_iterator()
        for number, record in enumerate(records):
            if not record.get("id") or (counts and record["id"] == record.get("where")):
                record["id"] = (f"{shard:05d}/" * (shards > 1) + f"{number:09d}").encode()
            yield record


def _is_read_directly(task: seqio.Task) -> bool:
    """Whether TensorFlow can be bypassed: a source of ours without preprocessors."""
    return isinstance(task.source, FileSource | GeneratorSource) and not task.preprocessors


def _dataset(task: seqio.Task, split: str, shard: int, shards: int) -> tf.data.Dataset:
    with _readable(task, split):
        part = seqio.ShardInfo(shard, shards) if shards > 1 else None
        dataset = task.get_dataset(split=split, shuffle=False, try_in_mem_cache=False, shard_info=part)
    options = tf.data.Options()
    options.deterministic = True
    return _string_features(task, dataset).with_options(options)


_UNREADABLE = (
    ValueError,
    OSError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.DataLossError,
    tf.errors.UnimplementedError,  # an unknown file system
)


def _string_features(task: seqio.Task, dataset: tf.data.Dataset) -> tf.data.Dataset:
    spec = dataset.element_spec
    found = [name for name in FEATURES if name in spec]
    if not set(CONTENTS) & set(found):
        tokens = [key for key, each in spec.items() if key in task.output_features and each.dtype.is_integer]
        if tokens:
            raise UserError(
                f"task {task.name!r} gives tokens of its own vocabulary ({', '.join(tokens)}): stores have those of"
                " config.tokenizer, so register the task again without seqio.preprocessors.tokenize, and map its"
                " strings to `text` or `messages`"
            )
        raise UserError(
            f"task {task.name!r} gives none of {', '.join(CONTENTS)} but {', '.join(sorted(spec))}: end its"
            " preprocessors with one that maps an example to these string features"
        )
    for name in found:
        if spec[name].dtype != tf.string or spec[name].shape.rank != 0:
            raise UserError(
                f"task {task.name!r} gives `{name}` as {spec[name].dtype.name}{spec[name].shape}: it must be"
                " one string"
            )
    return dataset.map(lambda example: {name: example[name] for name in found})
