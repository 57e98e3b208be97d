"""Prompts to completions."""

import dataclasses
from collections.abc import Sequence

from lemur_jax.infer.batching import bucket, row_shards
from lemur_jax.infer.engine import ROWS, SLOTS, Engine, Request, check_request
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What followed one prompt.

    Attributes:
      tokens: generated ids, the stop id that ended the sequence included.
      logprobs: of each token, in nats, under the model's own distribution before any filter.
      finish_reason: "stop" (stop id or string), "length" (max_new_tokens), or "" (not ended).
      text: of `content` up to the first stop string; "" where only ids are needed.
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
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Continues every prompt.

    Args:
      session: from `load` or `make_session`.
      prompts: token ids, at least one each.
      max_new_tokens: for each prompt.
      stop_ids: ids that end a sequence.
      sampling: default greedy.
      seeds: one for each prompt, by default its index. With `sampling.seed` it determines what is drawn,
        independent of the other prompts.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or a sequence that would become longer
        than the model's `max_position_embeddings`.
    """
    for index, prompt in enumerate(prompts):
        check_request(session, f"prompt {index}", prompt, max_new_tokens)
    requests = make_requests(prompts, max_new_tokens, stop_ids, sampling, seeds)
    engine = make_engine(session, requests)
    while engine.busy:
        engine.step()
    return [completion(request) for request in requests]


def make_requests(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling | None,
    seeds: Sequence[int] | None,
) -> list[Request]:
    """The arguments of `generate` as requests of the engine."""
    options = dict(max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling or Sampling())
    seeds = range(len(prompts)) if seeds is None else seeds
    return [Request(prompt=prompt, seed=seed, **options) for prompt, seed in zip(prompts, seeds, strict=True)]


def make_engine(session: Session, requests: Sequence[Request], slots: int = SLOTS, length: int = 0) -> Engine:
    """An engine with these requests, and with rows for all of them if they are few."""
    shards = row_shards(session)
    engine = Engine(session, shards * min(ROWS, bucket(-(-max(1, len(requests)) // shards))), slots, length)
    for request in requests:
        engine.submit(request)
    return engine


def completion(request: Request) -> Completion:
    """The completion of a request so far."""
    return Completion(
        tokens=tuple(request.tokens),
        logprobs=tuple(request.logprobs),
        finish_reason=request.finish_reason,
        stop_id=bool(request.tokens) and request.tokens[-1] in request.stop_ids,
    )
