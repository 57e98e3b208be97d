"""An evaluation can be given up soon: the devices are never far behind."""

import types

import numpy as np

from lemur_jax.train import evaluate


class Sums:
    """Figures of a batch, which the device has computed when somebody has waited for them."""

    def __init__(self, waited: list):
        self._waited = waited

    def block_until_ready(self):
        self._waited.append(self)

    def __array__(self, *_, **__):
        return np.ones(2)


def test_batches_are_scored_shortly_before_their_figures_are_waited_for(monkeypatch):
    waited, asked, ahead = [], [], []
    monkeypatch.setattr(evaluate, "held_out_batches", lambda *_, **__: (batch for batch in range(9)))
    monkeypatch.setattr(evaluate, "batch_sharding", lambda mesh: None)

    def score(params, batch):
        ahead.append(batch - len(waited) // 2)
        return types.SimpleNamespace(loss=Sums(waited), weight=Sums(waited))

    program = types.SimpleNamespace(mesh=types.SimpleNamespace(shape={"data": 1, "fsdp": 1}), score=score)
    held_out = types.SimpleNamespace(task="text", rows=None, bytes_per_target=1.0)
    found = evaluate.evaluate(program, None, held_out, 2, 0)
    assert (found["tokens"], found["loss"]) == (18, 1.0)
    assert max(ahead) == 2

    def give_up():
        asked.append(len(ahead))
        return len(asked) == 4

    ahead.clear()
    assert evaluate.evaluate(program, None, held_out, 2, 0, give_up) is None
    assert asked == [0, 1, 2, 3]
