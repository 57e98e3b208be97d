"""A seqio source of records in memory, preparing from it, and comparing what was written."""

import logging

from lemur_jax.prepare.prepare import prepare

# After prepare, which keeps TensorFlow quiet.
import seqio  # isort: skip
import tensorflow as tf  # isort: skip

STRING = tf.TensorSpec((), tf.string)


class ListSource(seqio.FunctionDataSource):
    """Records that a test can change; an exception among them is raised when it is reached."""

    def __init__(self, records):
        self.records = records
        super().__init__(self._dataset, splits=list(records))

    def _dataset(self, split, shuffle_files, seed=None):
        features = next((r for r in self.records[split] if isinstance(r, dict)), {"text": b""})
        return tf.data.Dataset.from_generator(
            lambda: self._generate(split), output_signature=dict.fromkeys(features, STRING)
        )

    def _generate(self, split):
        for item in self.records[split]:
            if isinstance(item, Exception):
                raise item
            yield item

    def fingerprint(self, split):
        return repr(self.records[split])


def function_source(values, splits=("train",), **options):
    """Examples, a list for each feature, as a seqio source."""
    return seqio.FunctionDataSource(
        lambda split, shuffle_files: tf.data.Dataset.from_tensor_slices(values), splits=splits, **options
    )


def run(config, **options):
    """Prepares; returns what was logged, a line an entry."""
    messages = []
    handler = logging.Handler()
    handler.addFilter(lambda record: not record.name.endswith("progress"))
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("lemur_jax")
    logger.addHandler(handler)
    try:
        prepare(config, **options)
    finally:
        logger.removeHandler(handler)
    return messages


def files_of(directory):
    """The content of each file, by its path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def planted_texts(generator, earlier):
    """A hundred texts, copies of `earlier` ones, near copies and short ones among them; new ones join `earlier`."""
    for index in range(100):
        text = " ".join(generator.choices([f"word{n}" for n in range(500)], k=60))
        if index % 10 == 3 and earlier:
            text = generator.choice(earlier)
        elif index % 10 == 5 and earlier:
            text = generator.choice(earlier) + " more"
        elif index % 10 == 7:
            text = "short"
        else:
            earlier.append(text)
        yield text


def write_tfrecord(path, rows, compression=""):
    """Writes tf.Examples of lists of bytes or integers."""
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for row in rows:
            feature = {
                key: tf.train.Feature(int64_list=tf.train.Int64List(value=values))
                if key == "stars"
                else tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
                for key, values in row.items()
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
