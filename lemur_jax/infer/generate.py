"""Prompts to completions, whole or streamed."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.infer.batching import bucket, row_ways
from lemur_jax.infer.engine import ROWS, SLOTS, Engine, Request, check_request
from lemur_jax.infer.programs import CHUNK
from lemur_jax.infer.sampling import Sampling
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
    """Continues every prompt.

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
    requests = _requests(session, prompts, max_new_tokens, stop_ids, sampling, seeds)
    engine = make_engine(session, requests)
    while engine.busy:
        engine.step()
    return [completion(request) for request in requests]


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
    requests = _requests(session, prompts, max_new_tokens, stop_ids, sampling, seeds)
    engine = make_engine(session, requests)
    shown = [0] * len(requests)
    while engine.busy:
        if engine.step(chunk):
            yield [completion(request, start) for request, start in zip(requests, shown, strict=True)]
            shown = [len(request.tokens) for request in requests]


def make_engine(session: Session, requests: Sequence[Request], slots: int = SLOTS) -> Engine:
    """An engine with these requests, and with rows for all of them if they are few."""
    ways = row_ways(session)
    engine = Engine(session, ways * min(ROWS, bucket(-(-max(1, len(requests)) // ways))), slots)
    for request in requests:
        engine.submit(request)
    return engine


def completion(request: Request, start: int = 0) -> Completion:
    """The tokens of a request from `start` on; the reason why it ended comes with the last of them."""
    tokens = tuple(request.tokens[start:])
    return Completion(
        tokens=tokens,
        logprobs=tuple(request.logprobs[start:]),
        finish_reason=request.finish_reason if tokens else "",
        stop_id=bool(tokens) and tokens[-1] in request.stop_ids,
    )


def _requests(session: Session, prompts, max_new_tokens, stop_ids, sampling, seeds) -> list[Request]:
    """The arguments of `generate`, checked."""
    count = len(prompts)
    limits = _for_each("max_new_tokens", max_new_tokens, count)
    nested = len(stop_ids) > 0 and not isinstance(stop_ids[0], int | np.integer)
    stops = _for_each("stop_ids", stop_ids if nested else [stop_ids] * count, count)
    seeds = _for_each("seeds", range(count) if seeds is None else seeds, count)
    sampling = sampling or Sampling()
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        check_request(session, f"prompt {index}", prompt, limit)
    return [
        Request(prompt=prompt, max_new_tokens=limit, stop_ids=stop, sampling=sampling, seed=seed)
        for prompt, limit, stop, seed in zip(prompts, limits, stops, seeds, strict=True)
    ]


def _for_each(name: str, values, count: int) -> list:
    """One value for each prompt, from one for all or a sequence."""
    values = [values] * count if isinstance(values, int | np.integer) else list(values)
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} entries for {count} prompts")
    return values
