"""Log-probabilities of given text: no sampling, no cache, logits only where they are needed.

Axis legend: B batch, T position, P asked position, E candidate, K likeliest, D model, V vocabulary.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.infer.batching import bucket, padded_length, put, row_shards
from lemur_jax.infer.engine import check_ids
from lemur_jax.infer.session import Session
from lemur_jax.models import decoder
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Compute, Params
from lemur_jax.parallel.rules import constrain

# Tokens of a batch, padding included.
BATCH_TOKENS = 8192
# Up to this many batches at the end of a call share one shape, and rows of one asked position join longer ones.
FEW_BATCHES = 4
# Positions of a batch whose logits [., V] exist at a time.
LOGIT_POSITIONS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How likely the model finds a continuation.

    Attributes:
      logprobs: of each of its tokens given all before it, in nats.
      greedy: for each token whether it is the likeliest one.
      top: for each token the likeliest ids in its place with their log-probabilities, likeliest first.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    top: tuple[dict[int, float], ...] = ()

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One sequence to run, for all requests that differ only in the last token."""

    tokens: tuple[int, ...]  # the model's input: all but the last token
    asked: int  # positions asked for, at its end
    last: list[int]  # distinct last tokens
    requests: list[int]


def score(
    session: Session,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    top: int = 0,
) -> list[Score]:
    """Scores (context, continuation) pairs of ids.

    Pairs are batched by length; those that differ only in their last token (the options of a question) are run once.

    Args:
      requests: contexts and continuations, neither of them empty.
      batch_tokens: tokens of a batch, padding included.
      top: K, how many of the likeliest ids to report for each token.

    Raises:
      UserError: an empty context or continuation, an id outside the vocabulary, a sequence longer than the model's
        `max_position_embeddings` (its last token need not fit), or `top` not between 0 and the vocabulary's size.
    """
    if not 0 <= top <= session.model.vocab_size:
        raise UserError(f"top is {top}: it must be between 0 and {session.model.vocab_size}")
    for index, (context, continuation) in enumerate(requests):
        _check_request(session, index, context, continuation)
    scores: dict[int, Score] = {}
    for rows, T, P, B in _batches(session, _merge_requests(requests), batch_tokens):
        arrays = (put(session, array) for array in _pack(rows, T, P, B))
        found = _score(session.model, session.compute, top, session.params, *arrays)
        outputs = list(map(np.asarray, found))
        for index, row in enumerate(rows):
            for request in row.requests:
                scores[request] = _unpack(row, requests[request][1], *(output[index] for output in outputs))
    return [scores[index] for index in range(len(requests))]


def _check_request(session: Session, index: int, context: Sequence[int], continuation: Sequence[int]) -> None:
    if not len(context) or not len(continuation):
        raise UserError(f"request {index}: context and continuation need at least one token each")
    check_ids(session, f"request {index}", (*context, *continuation))
    max_length = session.model.max_position_embeddings
    if len(context) + len(continuation) - 1 > max_length:
        raise UserError(
            f"request {index} has {len(context) + len(continuation)} tokens, the model's"
            f" max_position_embeddings are {max_length}: cut its context"
        )


def _merge_requests(requests) -> list[_Row]:
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

    Batches are filled regardless of the lengths in them. The last `FEW_BATCHES` keep one shape, and a few rows of one
    asked position join those of `_position_bucket(2)`: padding costs less than compiling another program.
    """
    shards = row_shards(session)
    groups: dict[int, list[_Row]] = collections.defaultdict(list)
    for row in rows:
        groups[_position_bucket(row.asked)].append(row)
    single, several = groups[1], groups[_position_bucket(2)]
    if several and sum(len(row.tokens) for row in single) <= FEW_BATCHES * batch_tokens:
        several += groups.pop(1)
    for P, group in sorted(groups.items(), reverse=True):
        group.sort(key=lambda row: -len(row.tokens))
        T = B = 0
        while group:
            if len(group) > FEW_BATCHES * B:
                T = padded_length(session, len(group[0].tokens))
                max_rows = max(1, batch_tokens // (T * shards))
                rest = -(-len(group) // shards)
                # Equal batches instead of a last one that is nearly empty.
                B = shards * min(max_rows, bucket(-(-rest // -(-rest // max_rows))))
            yield group[:B], T, min(P, T), B
            group = group[B:]


def _position_bucket(size: int) -> int:
    """The next of 1, 16, 64, 256, ...: a few more positions of logits cost less than another program."""
    bits = (size - 1).bit_length()
    return 1 if size == 1 else max(16, 1 << (bits + bits % 2))


def _pack(rows: list[_Row], T: int, P: int, B: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int32 tokens [B, T] padded with -1, asked positions [B, P] and candidates there [B, P, E]."""
    E = 1 << (max(len(row.last) for row in rows) - 1).bit_length()
    tokens, positions, candidates = np.full((B, T), -1), np.zeros((B, P)), np.zeros((B, P, E))
    tokens[:, 0] = 0
    for index, row in enumerate(rows):
        length, count = len(row.tokens), row.asked
        tokens[index, :length] = row.tokens
        positions[index, :count] = np.arange(length - count, length)
        candidates[index, : count - 1, 0] = row.tokens[length - count + 1 :]
        candidates[index, count - 1, : len(row.last)] = row.last
    return tokens.astype(np.int32), positions.astype(np.int32), candidates.astype(np.int32)


def _unpack(
    row: _Row,
    continuation: Sequence[int],
    logprobs: np.ndarray,
    likeliest: np.ndarray,
    top: np.ndarray,
    top_ids: np.ndarray,
) -> Score:
    end = row.asked - 1
    token_logprobs = [*logprobs[:end, 0].tolist(), float(logprobs[end, row.last.index(continuation[-1])])]
    tops = zip(top_ids[: row.asked].tolist(), top[: row.asked].tolist(), strict=True)
    return Score(
        logprobs=tuple(token_logprobs),
        greedy=tuple((likeliest[: row.asked] == np.asarray(continuation)).tolist()),
        top=tuple(dict(zip(ids, values, strict=True)) for ids, values in tops),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    config: DecoderConfig,
    compute: Compute,
    top: int,
    params: Params,
    tokens: jax.Array,
    asked: jax.Array,
    candidates: jax.Array,
) -> tuple[jax.Array, ...]:
    """Log-probabilities float32 [B, P, E] of `candidates`, the likeliest ids int32 [B, P], and log-probabilities
    and ids of the `top` likeliest [B, P, K]."""
    (B, T), P = tokens.shape, asked.shape[1]
    model = decoder.bind(config, compute, params)
    segments = (tokens >= 0).astype(jnp.int32)
    positions = jnp.arange(T) * segments  # of padding 0, so that T does not count
    hidden, _, _ = model(jnp.maximum(tokens, 0), positions, model.packed(segments))
    hidden = jnp.take_along_axis(hidden, asked[..., None], axis=1)

    def chosen(logits, ids):  # [B, C, V], [B, C] -> [B, C]; no gather, the vocabulary may be sharded
        hit = ids[..., None] == jnp.arange(logits.shape[-1])
        return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)

    def chunk(arrays):
        hidden, candidates = arrays  # [B, C, D], [B, C, E]
        logits = model.logits(hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        of_candidates = [chosen(logits, candidates[..., e]) for e in range(candidates.shape[-1])]
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logps = constrain(logits - log_z, compute.mesh, "width", "width", "width") if top else log_z[..., :0]
        return jnp.stack(of_candidates, axis=-1) - log_z, likeliest, *jax.lax.top_k(logps, top)

    size = P
    while B * size > LOGIT_POSITIONS and size % 2 == 0:
        size //= 2

    def split(x):  # [B, P, ...] -> [P / C, B, C, ...]
        return jnp.moveaxis(x.reshape(B, P // size, size, *x.shape[2:]), 1, 0)

    def merge(x):  # and back, a whole copy on every device
        x = jnp.moveaxis(x, 0, 1).reshape(B, P, *x.shape[3:])
        return constrain(x, compute.mesh, *("width",) * x.ndim)

    return tuple(map(merge, jax.lax.map(chunk, (split(hidden), split(candidates)))))
