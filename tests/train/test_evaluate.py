"""An evaluation can be given up soon: the devices are never far behind."""

import types

import numpy as np
import pytest

from lemur_jax.data.mixture import PACKINGS
from lemur_jax.train import evaluate
from lemur_jax.train.history import RunHistory
from tests.helpers.tiny import tiny_config


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

    program = types.SimpleNamespace(
        mesh=types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "expert": 1}), score=score
    )
    held_out = types.SimpleNamespace(task="text", rows=None, num_bytes=18)
    found = evaluate.evaluate(program, None, held_out, 2, 0)
    assert (found["tokens"], found["loss"]) == (18, 1.0)
    assert max(ahead) == 2

    def give_up():
        asked.append(len(ahead))
        return len(asked) == 4

    ahead.clear()
    assert evaluate.evaluate(program, None, held_out, 2, 0, give_up) is None
    assert asked == [0, 1, 2, 3]


def steps_of(config):
    sections = {"options": config.eval, "checkpoint": config.checkpoint, "init": config.init}
    return evaluate.EvaluationSteps(**sections, last=config.train.steps)


@pytest.mark.parametrize(
    ("step", "promised"),
    [(2, True), (4, True), (10, True), (3, False)],  # due, its save is compared, the last, a save out of turn
)
def test_what_is_said_of_a_stopped_evaluation_is_so(monkeypatch, caplog, step, promised):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: None)
    options = {"tasks": ("text",), "every_steps": 2}
    config = tiny_config(
        {f"eval.{key}": value for key, value in options.items()}
        | {"checkpoint.every_steps": 4, "checkpoint.keep_best": "text", "train.steps": 10}
    )
    held_out = evaluate.HeldOut(task="text", rows=None, num_bytes=18)
    history = RunHistory(writer=object())
    evaluations = evaluate.Evaluations(None, 1, steps_of(config), [held_out], history)
    assert evaluations.score(None, step) == {}
    (record,) = caplog.records
    assert record.getMessage().endswith("at the next start" if promised else "is not among the best")
    assert evaluations.unscored(step) == (["text"] if promised else [])


@pytest.mark.parametrize(("size", "shown"), [(18, "+100.0% since the start"), (17, "bits/byte")])
def test_the_start_is_compared_where_it_was_of_the_same_text(monkeypatch, caplog, size, shown):
    """`eval.max_rows`, or the validation store, may have changed since."""
    now = {"task": "text", "loss": 1.0, "bits_per_byte": 2.0, "tokens": 9, "bytes": 18}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: dict(now))
    config, written = tiny_config({"eval.tasks": ("text",)}), []
    start = {**now, "step": 0, "kind": "eval", "bits_per_byte": 1.0, "bytes": size}
    history = RunHistory(writer=types.SimpleNamespace(write=written.append), records=[start])
    held_out = evaluate.HeldOut(task="text", rows=None, num_bytes=18)
    evaluate.Evaluations(None, 1, steps_of(config), [held_out], history).score(None, 10)
    assert shown in caplog.messages[0]
    assert [record.get("change") for record in written] == ([1.0, None] if size == 18 else [None])


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_the_bytes_of_all_rows_are_those_of_the_documents(make_store, tokenizer, packing):
    texts = [f"def größe{n}(x):\n    return x + {n}  # 漢字 {'y ' * (n % 7)}\n" for n in range(60)]
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    rows = PACKINGS[packing](make_store(documents, vocab_size=tokenizer.vocab_size), 256)
    count = len(rows)
    assert count > 8
    size = evaluate.count_bytes(rows, np.arange(count), tokenizer)
    expected = sum(len(text.encode()) for text in texts)
    assert abs(size - expected) <= (count * 4 if packing == "concat" else 0)  # a cut may divide a character
    parts = [evaluate.count_bytes(rows, np.arange(n, count, 3), tokenizer) for n in range(3)]
    assert sum(parts) == size
