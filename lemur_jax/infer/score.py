"""Log-probabilities of given text: no sampling, no cache, logits only where something is asked.

Axis legend: B batch, T position, P asked position, E candidate, D model, V vocabulary.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.infer.generate import _put, _slots, bucket
from lemur_jax.infer.session import Session
from lemur_jax.models import llama
from lemur_jax.models.config import LlamaConfig
from lemur_jax.models.llama import Compute, Params
from lemur_jax.parallel.rules import constrain

# Tokens of a batch, padding included; decides how many rows run at once.
BATCH_TOKENS = 8192
# So many batches at the end of a call have one shape, and rows of one asked position one with longer ones.
FEW_BATCHES = 4
# Positions of a batch whose logits [., V] exist at a time.
LOGIT_POSITIONS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What the model makes of a continuation.

    Attributes:
      logprobs: of each of its tokens given all before it, in nats.
      greedy: for each token whether it is the likeliest one.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One sequence to run, for every request that differs from it in the last token alone."""

    tokens: tuple[int, ...]  # the model's input: all but the last token
    asked: int  # how many positions at its end are asked for
    last: list[int]  # distinct last tokens
    requests: list[int]


def score(
    session: Session,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Score]:
    """Scores (context, continuation) pairs of ids.

    Pairs are batched by length, and one program is compiled for each shape of a batch; pairs that
    differ in their last token alone (the options of a multiple-choice question) are run once.

    Args:
      requests: contexts and continuations, neither of them empty.
      batch_tokens: tokens of a batch, padding included.

    Raises:
      UserError: an empty context or continuation, an id outside the vocabulary, or a sequence longer
        than the model's `max_position_embeddings` (its last token need not fit).
    """
    for index, (context, continuation) in enumerate(requests):
        _check(session, index, context, continuation)
    scores: dict[int, Score] = {}
    for rows, T, P, B in _batches(session, _merge(requests), batch_tokens):
        scores |= _run(session, requests, rows, T, P, B)
    return [scores[index] for index in range(len(requests))]


def _check(session: Session, index: int, context: Sequence[int], continuation: Sequence[int]) -> None:
    if not len(context) or not len(continuation):
        raise UserError(f"request {index}: context and continuation need at least one token each")
    if not all(0 <= token < session.model.vocab_size for token in (*context, *continuation)):
        raise UserError(
            f"request {index} has a token id outside the model's vocabulary of {session.model.vocab_size}"
        )
    longest = session.model.max_position_embeddings
    if len(context) + len(continuation) - 1 > longest:
        raise UserError(
            f"request {index} has {len(context) + len(continuation)} tokens, the model's"
            f" max_position_embeddings are {longest}: cut its context"
        )


def _merge(requests) -> list[_Row]:
    rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for index, (context, continuation) in enumerate(requests):
        tokens = (*context, *continuation[:-1])
        row = rows.setdefault((tokens, len(continuation)), _Row(tokens, len(continuation), [], []))
        row.requests.append(index)
        if continuation[-1] not in row.last:
            row.last.append(continuation[-1])
    return list(rows.values())


def _batches(
    session: Session, rows: list[_Row], batch_tokens: int
) -> Iterator[tuple[list[_Row], int, int, int]]:
    """(rows, T, P, B), longest first: what does not fit in memory fails at once.

    A batch is full whatever the lengths in it, and what is left for `FEW_BATCHES` keeps the last shape: to pad that
    much costs less than another program; and so it does to ask a few rows of one position for `_asked(2)` of them. Many
    requests have neighbours of nearly their own length.
    """
    ways = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    groups: dict[int, list[_Row]] = collections.defaultdict(list)
    for row in rows:
        groups[_asked(row.asked)].append(row)
    single, several = groups[1], groups[_asked(2)]
    if several and sum(len(row.tokens) for row in single) <= FEW_BATCHES * batch_tokens:
        several += groups.pop(1)
    for P, group in sorted(groups.items(), reverse=True):
        group.sort(key=lambda row: -len(row.tokens))
        T = B = 0
        while group:
            if len(group) > FEW_BATCHES * B:
                T = _slots(session, len(group[0].tokens))
                most = max(1, batch_tokens // (T * ways))
                rest = -(-len(group) // ways)
                # As many in each, rather than a last one that is nearly empty.
                B = ways * min(most, bucket(-(-rest // -(-rest // most))))
            yield group[:B], T, min(P, T), B
            group = group[B:]


def _asked(size: int) -> int:
    """The next of 1, 16, 64, 256, ...: logits of a few positions more cost less than another program."""
    bits = (size - 1).bit_length()
    return 1 if size == 1 else max(16, 1 << (bits + bits % 2))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _run(session: Session, requests, rows: list[_Row], T: int, P: int, B: int) -> dict[int, Score]:
    E = _power_of_two(max(len(row.last) for row in rows))
    tokens, valid = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    where, targets = np.zeros((B, P), np.int32), np.zeros((B, P), np.int32)
    end, candidates = np.zeros(B, np.int32), np.zeros((B, E), np.int32)
    valid[:, 0] = 1
    for index, row in enumerate(rows):
        length = len(row.tokens)
        tokens[index, :length], valid[index, :length] = row.tokens, 1
        where[index, : row.asked] = np.arange(length - row.asked, length)
        targets[index, : row.asked - 1] = row.tokens[length - row.asked + 1 :]
        end[index] = row.asked - 1
        candidates[index, : len(row.last)] = row.last
    arrays = (_put(session, array) for array in (tokens, valid, where, targets, end, candidates))
    run = _program(session.model, session.compute)
    logprobs, likeliest, of_candidates = map(np.asarray, run(session.params, *arrays))
    found = {}
    for index, row in enumerate(rows):
        inner = slice(0, row.asked - 1)
        before = logprobs[index, inner].tolist()
        hits = (likeliest[index, inner] == targets[index, inner]).tolist()
        for request in row.requests:
            last = requests[request][1][-1]
            found[request] = Score(
                logprobs=(*before, float(of_candidates[index, row.last.index(last)])),
                greedy=(*hits, bool(likeliest[index, row.asked - 1] == last)),
            )
    return found


def top_logprobs(
    session: Session, requests: Sequence[tuple[Sequence[int], Sequence[int]]], k: int
) -> list[list[dict[int, float]]]:
    """For each (context, continuation), at each token of the continuation: the k likeliest ids there, likeliest
    first, with their log-probabilities in nats under the model's own distribution.

    All of them run as one batch: for a few short texts, as an endpoint has them.

    Raises:
      UserError: as `score`, or a k that is not between 1 and the vocabulary's size.
    """
    if not 1 <= k <= session.model.vocab_size:
        raise UserError(
            f"top log-probabilities of {k} tokens: it must be between 1 and {session.model.vocab_size}"
        )
    for index, (context, continuation) in enumerate(requests):
        _check(session, index, context, continuation)
    ways = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    B = ways * bucket(-(-len(requests) // ways))
    T = _slots(session, max(len(context) + len(continuation) - 1 for context, continuation in requests))
    P = bucket(max(len(continuation) for _, continuation in requests))
    tokens, valid, where = (np.zeros(shape, np.int32) for shape in ((B, T), (B, T), (B, P)))
    valid[:, 0] = 1
    for index, (context, continuation) in enumerate(requests):
        row = [*context, *continuation[:-1]]
        tokens[index, : len(row)], valid[index, : len(row)] = row, 1
        where[index, : len(continuation)] = np.arange(len(context) - 1, len(row))
    arrays = (_put(session, array) for array in (tokens, valid, where))
    values, ids = map(np.asarray, _top_program(session.model, session.compute, k)(session.params, *arrays))
    return [
        [
            dict(zip(ids[row, place].tolist(), values[row, place].tolist(), strict=True))
            for place in range(len(said))
        ]
        for row, (_, said) in enumerate(requests)
    ]


@functools.lru_cache(maxsize=8)
def _top_program(config: LlamaConfig, compute: Compute, k: int) -> Callable[..., tuple[jax.Array, ...]]:
    def top(params: Params, tokens: jax.Array, valid: jax.Array, where: jax.Array) -> tuple[jax.Array, ...]:
        """Log-probabilities float32 [B, P, k] and ids int32 [B, P, k]."""
        B, T = tokens.shape
        model = llama.bind(config, compute, params)
        hidden, _ = model(tokens, jnp.broadcast_to(jnp.arange(T), (B, T)), model.packed(valid))
        hidden = jnp.take_along_axis(hidden, where[..., None], axis=1)
        logprobs = jax.nn.log_softmax(model.logits(hidden), axis=-1)
        whole = constrain(logprobs, compute.mesh, "width", "width", "width")
        return tuple(jax.lax.top_k(whole, k))

    return jax.jit(top)


@functools.lru_cache(maxsize=8)
def _program(config: LlamaConfig, compute: Compute) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(functools.partial(_score, config, compute))


def _score(
    config: LlamaConfig,
    compute: Compute,
    params: Params,
    tokens: jax.Array,
    valid: jax.Array,
    where: jax.Array,
    targets: jax.Array,
    end: jax.Array,
    candidates: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities float32 [B, P] of `targets`, the likeliest ids int32 [B, P], and
    log-probabilities float32 [B, E] of `candidates` at asked position `end` [B]."""
    B, T = tokens.shape
    model = llama.bind(config, compute, params)
    hidden, _ = model(tokens, jnp.broadcast_to(jnp.arange(T), (B, T)), model.packed(valid))
    hidden = jnp.take_along_axis(hidden, where[..., None], axis=1)

    def chosen(logits, ids):  # [B, C, V], [B, C] -> [B, C]; no gather, the vocabulary may be cut
        hit = ids[..., None] == jnp.arange(logits.shape[-1])
        return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)

    def chunk(part):
        hidden, targets = part
        logits = model.logits(hidden)
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return chosen(logits, targets) - jax.nn.logsumexp(logits, axis=-1), likeliest

    P = targets.shape[1]
    size = P
    while B * size > LOGIT_POSITIONS and size % 2 == 0:
        size //= 2

    def split(x):  # [B, P, ...] -> [P / size, B, size, ...]
        return jnp.moveaxis(x.reshape(B, P // size, size, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, P)

    logprobs, likeliest = map(join, jax.lax.map(chunk, (split(hidden), split(targets))))
    final = model.logits(jnp.take_along_axis(hidden, end[:, None, None], axis=1))  # [B, 1, V]
    of_candidates = jnp.take_along_axis(final[:, 0], candidates, axis=-1)
    of_candidates -= jax.nn.logsumexp(final[:, 0], axis=-1, keepdims=True)
    whole = (constrain(x, compute.mesh, "width", "width") for x in (logprobs, likeliest, of_candidates))
    return tuple(whole)  # type: ignore[return-value]
