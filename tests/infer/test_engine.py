"""The engine: rows that are shared over time, and requests that do not notice."""

import random

import jax
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.infer.engine import Engine, Request
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import make_session
from lemur_jax.models.presets import preset
from tests.helpers.sessions import fresh_params, mesh_of


def request(number: int) -> Request:
    """One of many kinds of requests; the same again for the same number."""
    rng = random.Random(number)
    drawn = Sampling(temperature=rng.uniform(0.5, 2), top_p=rng.choice([0.8, 1.0]), top_k=rng.choice([0, 9]))
    return Request(
        prompt=[rng.randrange(512) for _ in range(rng.choice([1, 2, 31, 32, 33, 40]))],
        max_new_tokens=rng.randint(1, 20),
        sampling=drawn if number % 3 else Sampling(),
        seed=number,
        stop_ids=range(16 * number, 16 * number + 32),
    )


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def test_results_do_not_depend_on_who_shares_the_batch(tiny_session):
    """24 requests alone, and together in 4 rows, some of them sharing a prompt, some cancelled at any time."""
    alone = [request(number) for number in range(24)]
    engine = Engine(tiny_session, rows=4)
    for one in alone:
        engine.submit(one)
        finish(engine)
    assert {one.finish_reason for one in alone} == {"stop", "length"}
    together = [request(number) for number in range(24)]
    others = [Request(prompt=together[index].prompt, max_new_tokens=20, seed=99) for index in range(0, 24, 2)]
    for one, other in zip(together, [*others, *[None] * 12], strict=True):
        engine.submit(one)
        if other:
            engine.submit(other)
    rng, steps = random.Random(0), 0
    while engine.busy:
        progressed = engine.step(rng.randint(1, 5))
        assert all(one.tokens and one.finish_reason != "cancelled" for one in progressed)
        steps += 1
        if steps % 3 == 0:
            engine.cancel(rng.choice(others))
    assert {"cancelled"} < {one.finish_reason for one in others}
    for one, expected in zip(together, alone, strict=True):
        assert (one.tokens, one.finish_reason) == (expected.tokens, expected.finish_reason)
        np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=1e-5)


@pytest.fixture
def chunks(monkeypatch):
    """The number of prompts in each call of prefill."""
    found = []
    prefill = Engine._prefill
    monkeypatch.setattr(
        Engine, "_prefill", lambda self: found.append(sum(map(bool, self._prompts))) or prefill(self)
    )
    return found


def converse(engine: Engine, fresh: bool) -> list[list[tuple]]:
    """Tokens and log-probabilities of four conversations in each of three turns; `fresh`: each turn in a new engine."""
    heads = [[7] * 33, [7] * 33, [5] * 33, [3] * 40]
    said = []
    for turn in range(3):
        if fresh:
            engine = Engine(engine.session, rows=4)
        requests = [Request(prompt=head, max_new_tokens=3, seed=index) for index, head in enumerate(heads)]
        order = [(index + turn) % 4 for index in range(4)]  # others get the first free row
        for index in order:
            engine.submit(requests[index])
        finish(engine)
        said.append([(one.tokens, one.logprobs) for one in requests])
        heads = [[*one.prompt, *one.tokens, 11 + turn] for one in requests]
    return said


def test_a_conversation_reads_what_is_new(tiny_session, chunks):
    fresh = converse(Engine(tiny_session, rows=4), True)
    assert chunks == [3, 1, 3, 3, 3, 3]  # two conversations have the same prompts
    chunks.clear()
    assert converse(Engine(tiny_session, rows=4), False) == fresh
    assert chunks == [3, 1, 3, 3]


def test_long_conversations_with_the_same_instructions(monkeypatch):
    """Three conversations alternate. Each turn reads only its new tokens, in the program for few prompts.

    They grow beyond 128 tokens, where attention changes from 128 slots of the cache to all 256.
    """
    config = preset("tiny", max_position_embeddings=256)
    session = make_session(config, fresh_params(config), mesh_of(""), "float32")
    sizes = []
    prefill = session.programs.prefill
    monkeypatch.setattr(
        session.programs, "prefill", lambda *args: sizes.append(args[2].shape[0]) or prefill(*args)
    )

    def ask(engine, prompt):
        sizes.clear()
        one = engine.submit(Request(prompt=prompt, max_new_tokens=4))
        finish(engine)
        return one

    kept = Engine(session, rows=4, length=256)
    heads = [[5] * 40 + [number] * 30 for number in range(3)]
    for turn in range(3):
        for number, head in enumerate(heads):
            one = ask(kept, head)
            # 69 tokens are three chunks, the first of them known after the first conversation; later 34 or 35 are new.
            assert sizes == ([2] * (3 if number == 0 else 2) if turn == 0 else [2, 2])
            fresh = ask(Engine(session, rows=4, length=256), head)
            assert one.tokens == fresh.tokens
            np.testing.assert_allclose(one.logprobs, fresh.logprobs, atol=1e-5)
            heads[number] = [*head, *one.tokens, *[turn] * 30]


def test_other_parameters_use_no_earlier_prompt(tiny_session):
    params = jax.tree.map(lambda array: 2 * array, tiny_session.params)
    other = make_session(tiny_session.model, params, tiny_session.mesh, "float32")
    said = []
    for first in (tiny_session, other):
        engine = Engine(first, rows=4)
        if first is tiny_session:
            engine.submit(Request(prompt=[7] * 40, max_new_tokens=8))
            finish(engine)
        begun = engine.submit(Request(prompt=[9] * 50, max_new_tokens=8))
        engine.step()  # reads a chunk
        engine.session = other
        one = engine.submit(Request(prompt=[7] * 40, max_new_tokens=8))
        finish(engine)
        said.append((begun.tokens, begun.logprobs, one.tokens, one.logprobs))
    assert said[0] == said[1]


def test_a_group_reads_its_prompt_once(tiny_session, chunks):
    engine, sampling = Engine(tiny_session, rows=4), Sampling(temperature=1.5)
    group = [Request(prompt=[5] * 40, max_new_tokens=4, sampling=sampling, seed=seed) for seed in range(4)]
    for one in group:
        engine.submit(one)
    finish(engine)
    assert chunks == [1, 1]
    assert len({tuple(one.tokens) for one in group}) == 4


def test_few_rows_make_few_steps_while_prompts_are_read(tiny_session):
    engine = Engine(tiny_session, rows=4)
    short = engine.submit(Request(prompt=[1], max_new_tokens=20))
    engine.submit(Request(prompt=[2] * 60, max_new_tokens=4))
    engine.step()
    assert len(short.tokens) == 1
    finish(engine)
    assert len(short.tokens) == 20


def test_a_row_that_ends_is_given_to_a_waiting_request_at_once(tiny_session):
    engine = Engine(tiny_session, rows=2)
    long, *_ = [engine.submit(Request(prompt=[1], max_new_tokens=limit)) for limit in (30, 8, 8)]
    engine.step()  # reads the prompts
    engine.step()
    assert len(long.tokens) == 8


def test_longer_requests_wait_for_longer_rows(tiny_session):
    engine = Engine(tiny_session, rows=2, slots=64)
    short, long = Request(prompt=[1], max_new_tokens=30), Request(prompt=[1] * 30, max_new_tokens=34)
    engine.submit(short)
    engine.step(1)
    engine.submit(long)
    finish(engine)
    assert [len(short.tokens), len(long.tokens)] == [30, 34]
    assert not engine.step()


def test_a_long_request_leaves_no_few_long_rows_behind():
    config = preset("tiny", max_position_embeddings=256)
    session = make_session(config, fresh_params(config), mesh_of(""), "float32")

    def steps(engine):
        for token in range(8):
            engine.submit(Request(prompt=[token], max_new_tokens=8))
        count = 0
        while engine.busy:
            engine.step()
            count += 1
        return count

    engine = Engine(session, rows=8, slots=512)
    expected = steps(engine)
    engine.submit(Request(prompt=[1] * 200, max_new_tokens=50))
    finish(engine)
    assert steps(engine) == expected


def test_requests_that_cannot_be_answered_are_refused(tiny_session):
    engine = Engine(tiny_session, rows=2)
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.submit(Request(prompt=[], max_new_tokens=5))
    with pytest.raises(UserError, match="steps is 65"):
        engine.step(65)
    assert not engine.busy
    assert not engine.step()
