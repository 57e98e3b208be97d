"""Prompts to completions: batches on the host, tokens read back in chunks.

Axis legend: B batch, T prompt position, J stop ids, C tokens a dispatch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.infer.batching import bucket, padded_length, padded_rows, put
from lemur_jax.infer.programs import CHUNK, Rows
from lemur_jax.infer.sampling import Knobs, Sampling
from lemur_jax.infer.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What followed one prompt.

    Attributes:
      tokens: generated ids, the stop id that ended the sequence included.
      logprobs: of each token, in nats, under the model's own distribution before any filter.
      finish_reason: "stop" (stop id or string), "length" (max_new_tokens), or "" (the stream continues).
      text: of `content` up to the first stop string; "" where only ids were asked for.
      stop_id: whether the last token is a stop id.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    text: str = ""
    stop_id: bool = False

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the stop id."""
        return self.tokens[:-1] if self.stop_id else self.tokens


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
      prompts: token ids, at least one each.
      max_new_tokens: for all or for each.
      stop_ids: ids that end a sequence, for all or for each.
      sampling: default greedy.
      seeds: one for each prompt, by default its index. A seed and `sampling.seed` fix what is drawn, whatever
        the other prompts are.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or a sequence that would become longer
        than the model's `max_position_embeddings`.
    """
    options = dict(max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling, seeds=seeds)
    pieces = list(stream(session, prompts, **options, chunk=CHUNK))
    return [join([piece[index] for piece in pieces]) for index in range(len(prompts))]


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
    """`generate` in pieces: for each prompt what is new since the last piece, at most `chunk` tokens.

    Raises:
      UserError: as `generate`, before the first piece.
    """
    if not 1 <= chunk <= CHUNK:
        raise UserError(f"chunk is {chunk}: it must be between 1 and {CHUNK}")
    count = len(prompts)
    limits = _for_each("max_new_tokens", max_new_tokens, count)
    nested = len(stop_ids) > 0 and not isinstance(stop_ids[0], int | np.integer)
    stops = _for_each("stop_ids", stop_ids if nested else [stop_ids] * count, count)
    seeds = _for_each("seeds", range(count) if seeds is None else seeds, count)
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        _check_prompt(session, index, prompt, limit)
    knobs = (sampling or Sampling()).knobs()
    if prompts:
        tokens, rows = _make_batch(session, prompts, limits, stops, seeds)
        chunks = _chunks(session, tokens, rows, knobs, max(limits), chunk)
        yield from _pieces(chunks, stops, limits)


def _for_each(name: str, values, count: int) -> list:
    """One value for each prompt, from one for all or a sequence."""
    values = [values] * count if isinstance(values, int | np.integer) else list(values)
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} entries for {count} prompts")
    return values


def _check_prompt(session: Session, index: int, prompt: Sequence[int], limit: int) -> None:
    if not len(prompt):
        raise UserError(f"prompt {index} is empty: give it at least one token, e.g. bos")
    if limit < 1:
        raise UserError(f"max_new_tokens of prompt {index} is {limit}: it must be at least 1")
    check_ids(session, f"prompt {index}", prompt)
    longest = session.model.max_position_embeddings
    if len(prompt) + limit > longest:
        raise UserError(
            f"prompt {index} has {len(prompt)} tokens, and with max_new_tokens {limit} it may become longer"
            f" than the model's max_position_embeddings {longest}: shorten one of them"
        )


def check_ids(session: Session, what: str, ids: Sequence[int]) -> None:
    """Raises UserError for an id outside the model's vocabulary."""
    for token in ids:
        if not 0 <= token < session.model.vocab_size:
            raise UserError(
                f"{what} has token id {token}, outside the model's vocabulary of {session.model.vocab_size}"
            )


def _make_batch(session: Session, prompts, limits, stops, seeds) -> tuple[jax.Array, Rows]:
    """The padded prompts int32 [B, T] and the rows, on the mesh; rows of padding are finished from the start."""
    B, T = padded_rows(session, len(prompts)), padded_length(session, max(map(len, prompts)))
    J = bucket(max(2, *map(len, stops)))
    tokens, stop_ids = np.zeros((B, T), np.int32), np.full((B, J), -1, np.int32)
    last, remaining, length = np.zeros(B, np.int32), np.zeros(B, np.int32), np.ones(B, np.int32)
    seed = np.zeros(B, np.uint32)
    for row, (prompt, stop) in enumerate(zip(prompts, stops, strict=True)):
        tokens[row, : len(prompt)] = prompt
        stop_ids[row, : len(stop)] = stop
        last[row], length[row] = prompt[-1], len(prompt)
    remaining[: len(prompts)] = limits
    seed[: len(prompts)] = [value % 2**32 for value in seeds]
    rows = Rows(
        token=last,
        position=length - 1,
        prompt_length=length,
        remaining=remaining,
        seed=seed,
        stop_ids=stop_ids,
    )
    return jax.tree.map(lambda array: put(session, array), (tokens, rows))


def _chunks(
    session: Session, tokens: jax.Array, rows: Rows, knobs: Knobs, longest: int, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and log-probabilities [B, C] of prefill and of each dispatch of decode.

    The next dispatch is made before the last one is read, so that the devices never wait for the host.
    """
    run = session.programs
    new_slots = padded_length(session, longest)
    state, *waiting = run.prefill(session.params, tokens, rows, knobs, new_slots=new_slots)
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
            new = tokens[index][tokens[index] >= 0].tolist()
            left[index] -= len(new)
            stopped = bool(new) and new[-1] in stop
            reason = "stop" if stopped else "length" if new and not left[index] else ""
            if reason:
                left[index] = 0
            logs = tuple(logprobs[index, : len(new)].tolist())
            piece.append(Completion(tokens=tuple(new), logprobs=logs, finish_reason=reason, stop_id=stopped))
        yield piece
        if not any(left):
            return


def join(pieces: Sequence[Completion]) -> Completion:
    """The pieces of one prompt's stream as one completion."""
    return Completion(
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        finish_reason="".join(piece.finish_reason for piece in pieces),
        stop_id=any(piece.stop_id for piece in pieces),
    )
