"""Prompts to completions: batches made on the host, tokens read back in chunks.

Axis legend: B batch, T prompt position, J stop ids, C tokens a dispatch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from lemur_jax.common.errors import UserError
from lemur_jax.infer.programs import CHUNK, Rows
from lemur_jax.infer.sampling import Knobs, Sampling
from lemur_jax.infer.session import Session
from lemur_jax.parallel.rules import spec

# Prompt and room for new tokens are counted in units of so many slots, on accelerators of a register's
# 128 lanes; the attention kernels there take nothing else.
UNIT, LANES = 32, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What followed one prompt.

    Attributes:
      tokens: what was generated; the last is a stop id if it was one that ended the sequence.
      logprobs: of each token, in nats, under the model's own distribution before any filter.
      finish_reason: "stop" (a stop id), "length" (max_new_tokens), or "" in a piece of a stream that
        goes on.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the stop id."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int] | Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Continues every prompt; all of them run as one batch.

    Args:
      session: from `load` or `make_session`.
      prompts: token ids, of any lengths from 1 on.
      max_new_tokens: how many tokens at most, for all or for each.
      stop_ids: ids that end a sequence, for all or for each.
      sampling: default greedy.
      seeds: one for each prompt, by default its index. With `sampling.seed` it fixes what is drawn,
        whichever other prompts there are.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or a sequence that would become longer
        than the model's `max_position_embeddings`.
    """
    pieces = list(
        stream(
            session,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            seeds=seeds,
            chunk=CHUNK,
        )
    )
    return [_join([piece[index] for piece in pieces]) for index in range(len(prompts))]


def stream(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int] | Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    chunk: int = 8,
) -> Iterator[list[Completion]]:
    """`generate` in pieces: for each prompt what is new since the last piece, `chunk` tokens at most.

    Raises:
      UserError: as `generate`, before the first piece.
    """
    if not 1 <= chunk <= CHUNK:
        raise UserError(f"chunk is {chunk}: it must be between 1 and {CHUNK}")
    limits = _for_each("max_new_tokens", max_new_tokens, len(prompts))
    nested = len(stop_ids) > 0 and not isinstance(stop_ids[0], int | np.integer)
    stops = _for_each("stop_ids", stop_ids if nested else [stop_ids] * len(prompts), len(prompts))
    seeds = _for_each("seeds", range(len(prompts)) if seeds is None else seeds, len(prompts))
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        _check(session, index, prompt, limit)
    knobs = (sampling or Sampling()).knobs()
    if prompts:
        tokens, rows = _batch(session, prompts, limits, stops, seeds)
        chunks = _chunks(session, tokens, rows, knobs, max(limits), chunk)
        yield from _pieces(chunks, stops, limits)


def _check(session: Session, index: int, prompt: Sequence[int], limit: int) -> None:
    if not len(prompt):
        raise UserError(f"prompt {index} is empty: give it at least one token, e.g. bos")
    if limit < 1:
        raise UserError(f"max_new_tokens of prompt {index} is {limit}: it must be at least 1")
    for token in prompt:
        if not 0 <= token < session.model.vocab_size:
            raise UserError(
                f"prompt {index} has token id {token}, outside the model's vocabulary of"
                f" {session.model.vocab_size}"
            )
    longest = session.model.max_position_embeddings
    if len(prompt) + limit > longest:
        raise UserError(
            f"prompt {index} has {len(prompt)} tokens, and with max_new_tokens {limit} it may become longer"
            f" than the model's max_position_embeddings {longest}: shorten one of them"
        )


def _for_each(name: str, values, count: int) -> list:
    """One value for each prompt, from one for all or a sequence."""
    values = [values] * count if isinstance(values, int | np.integer) else list(values)
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} entries for {count} prompts")
    return values


def _batch(session: Session, prompts, limits, stops, seeds) -> tuple[jax.Array, Rows]:
    """The padded prompts int32 [B, T] and the rows, on the mesh.

    Rows that fill up the batch are finished from the start.
    """
    ways = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    B = ways * bucket(-(-len(prompts) // ways))
    T = _slots(session, max(map(len, prompts)))
    J = bucket(max(2, *map(len, stops)))
    tokens = np.zeros((B, T), np.int32)
    stop_ids = np.full((B, J), -1, np.int32)
    per_row = {name: np.zeros(B, np.int32) for name in ("prompt_length", "remaining", "token")}
    per_row["seed"] = np.zeros(B, np.uint32)
    per_row["prompt_length"][:] = 1
    for row, (prompt, limit, stop, seed) in enumerate(zip(prompts, limits, stops, seeds, strict=True)):
        tokens[row, : len(prompt)] = prompt
        stop_ids[row, : len(stop)] = stop
        per_row["prompt_length"][row] = len(prompt)
        per_row["remaining"][row] = limit
        per_row["token"][row] = prompt[-1]
        per_row["seed"][row] = seed % 2**32
    per_row["position"] = per_row["prompt_length"] - 1
    rows = Rows(**per_row, stop_ids=stop_ids)
    return jax.tree.map(lambda array: _put(session, array), (tokens, rows))


def _put(session: Session, array: np.ndarray) -> jax.Array:
    """A batch array onto the mesh; every host holds the same NumPy array and gives its own part."""
    axes = ("batch", "width")[: array.ndim]
    sharding = NamedSharding(session.mesh, spec(session.mesh, axes, array.shape))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def bucket(size: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: few shapes to compile, little padding."""
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step


def _slots(session: Session, size: int) -> int:
    on_cpu = session.mesh.devices.flat[0].platform == "cpu" and session.compute.attention != "splash"
    unit = UNIT if on_cpu else LANES
    return unit * bucket(-(-size // unit))


def _chunks(
    session: Session, tokens: jax.Array, rows: Rows, knobs: Knobs, longest: int, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and log-probabilities [B, C] of prefill and of each dispatch of decode.

    The next dispatch is made before the last one is read, so that the devices never wait for the
    host; when every row is finished it ends at once.
    """
    run = session.programs
    state, *waiting = run.prefill(session.params, tokens, rows, knobs, new_slots=_slots(session, longest))
    left = longest - 1
    while left > 0:
        state, *following = run.decode(session.params, state, knobs, np.int32(min(chunk, left)))
        yield np.asarray(waiting[0]), np.asarray(waiting[1])
        waiting, left = following, left - chunk
    yield np.asarray(waiting[0]), np.asarray(waiting[1])


def _pieces(chunks: Iterator, stops: list[Sequence[int]], limits: list[int]) -> Iterator[list[Completion]]:
    """Chunks as completions; ends when every prompt has ended."""
    left = list(limits)
    for tokens, logprobs in chunks:
        piece = []
        for index, stop in enumerate(stops):
            count = int(np.sum(tokens[index] >= 0))
            new = tokens[index, :count].tolist()
            left[index] -= count
            reason = ""
            if new and new[-1] in stop:
                reason, left[index] = "stop", 0
            elif new and not left[index]:
                reason = "length"
            logs = tuple(logprobs[index, :count].tolist())
            piece.append(Completion(tokens=tuple(new), logprobs=logs, finish_reason=reason))
        yield piece
        if not any(left):
            return


def _join(pieces: list[Completion]) -> Completion:
    return Completion(
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        finish_reason="".join(piece.finish_reason for piece in pieces),
    )
