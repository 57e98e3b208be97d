"""A seqio source of records in memory, and preparing from it."""

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


def run(config, **options):
    """Prepares; returns what was logged, a line an entry."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("lemur_jax")
    logger.addHandler(handler)
    try:
        prepare(config, **options)
    finally:
        logger.removeHandler(handler)
    return messages
