"""Sources of rows that are counted and not read."""

import numpy as np

from lemur_jax.data.mixture import Source


class FakeRows:
    """Rows that are counted and not read; `fill` real tokens in each of them."""

    store = None

    def __init__(self, count, length=16, fill=16):
        self.count, self.length, self.num_tokens = count, length, count * fill

    def __len__(self):
        return self.count

    def read(self, indices):
        tokens = np.repeat(np.asarray(indices)[:, None], self.length, axis=1).astype(np.int32)
        return {"tokens": tokens, "loss_weights": tokens.astype(np.float32)}

    def documents(self, index):
        return [f"d{index}", f"e{index}"]


def source(name, share, rows=1000, fill=16, **fields):
    return Source(name=name, rows=FakeRows(rows, fill=fill), share=share, **fields)


def ids_of(mixture, steps):
    return np.concatenate([mixture.locate(step)[0] for step in steps])
