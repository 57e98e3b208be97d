"""Text completions that end at stop strings, batched by length."""

import dataclasses
from collections.abc import Sequence

from lemur_jax.infer.generate import bucket, stream
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session
from lemur_jax.infer.text import continuation
from lemur_jax.text.chat_template import stop_ids

# Tokens of a batch, padding and room for generation included.
BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What followed a prompt.

    Attributes:
      text: up to the first stop string, without it.
      tokens: ids whose text it is, up to the one that completes the stop string, without a stop id.
      logprobs: of these, in nats.
      finish_reason: "stop" (a stop id or string) or "length".
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def complete(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Text]:
    """Continues every prompt until a stop id, a stop string or `max_new_tokens`.

    Prompts too long for the model lose their beginning.

    Args:
      prompts: ids, none of them empty.
      stops: strings that end an answer.
      seeds: one for each prompt; default its index.

    Raises:
      UserError: there is no tokenizer, or `max_new_tokens` leave no room for a prompt.
    """
    room = max(1, session.model.max_position_embeddings - max_new_tokens)
    seeds = list(range(len(prompts)) if seeds is None else seeds)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: dict[int, Text] = {}
    while order:
        length = bucket(min(room, len(prompts[order[0]]))) + max_new_tokens
        size = max(1, batch_tokens // length)
        batch, order = order[:size], order[size:]
        texts = _batch(
            session,
            [prompts[index][-room:] for index in batch],
            max_new_tokens,
            [stop for stop in stops if stop],
            sampling,
            [seeds[index] for index in batch],
        )
        found |= dict(zip(batch, texts, strict=True))
    return [found[index] for index in range(len(prompts))]


def _batch(session: Session, prompts, max_new_tokens: int, stops: list[str], sampling, seeds) -> list[Text]:
    tokenizer = session.need_tokenizer()
    done: dict[int, Text] = {}
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    pieces = stream(
        session,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(tokenizer),
        sampling=sampling,
        seeds=seeds,
        chunk=32,
    )
    for piece in pieces:
        for row, part in enumerate(piece):
            if row in done:
                continue
            tokens[row] += part.content
            logprobs[row] += part.logprobs[: len(part.content)]
            text = continuation(tokenizer, prompts[row], tokens[row])
            end = min((text.find(stop) for stop in stops if stop in text), default=-1)
            if end >= 0 or part.finish_reason:
                reason = "stop" if end >= 0 else part.finish_reason
                done[row] = Text(
                    text=text[:end] if end >= 0 else text,
                    tokens=tuple(tokens[row]),
                    logprobs=tuple(logprobs[row]),
                    finish_reason=reason,
                )
        # Stop strings are the host's business: the devices go on until every row has met one.
        if len(done) == len(prompts):
            break
    return [done[row] for row in range(len(prompts))]
