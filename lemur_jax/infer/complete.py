"""Text completions that end at stop strings, batched by length."""

import dataclasses
from collections.abc import Sequence

from lemur_jax.infer.batching import bucket
from lemur_jax.infer.generate import Completion, join, stream
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session
from lemur_jax.infer.text import continuation
from lemur_jax.text.chat_template import stop_ids

# Tokens of a batch, padding and room for generation included.
BATCH_TOKENS = 8192


def complete(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Completion]:
    """Continues every prompt until a stop id, a stop string or `max_new_tokens`; too long prompts lose their beginning.

    Args:
      prompts: ids, none of them empty.
      stops: strings that end an answer; `text` ends before the first, `tokens` with the one that completes it.
      seeds: one for each prompt; default its index.

    Raises:
      UserError: there is no tokenizer, or `max_new_tokens` leave no room for a prompt.
    """
    room = max(1, session.model.max_position_embeddings - max_new_tokens)
    prompts = [prompt[-room:] for prompt in prompts]
    seeds = list(range(len(prompts)) if seeds is None else seeds)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: dict[int, Completion] = {}
    while order:
        size = max(1, batch_tokens // (bucket(len(prompts[order[0]])) + max_new_tokens))
        batch, order = order[:size], order[size:]
        pieces = stream(
            session,
            [prompts[index] for index in batch],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids(session.need_tokenizer()),
            sampling=sampling,
            seeds=[seeds[index] for index in batch],
            chunk=32,
        )
        texts = _until_stops(session, [prompts[index] for index in batch], pieces, list(filter(None, stops)))
        found |= dict(zip(batch, texts, strict=True))
    return [found[index] for index in range(len(prompts))]


def _until_stops(session: Session, prompts, pieces, stops: Sequence[str]) -> list[Completion]:
    """A batch's stream as completions with text; read until every row has ended."""
    done: dict[int, Completion] = {}
    parts: list[list[Completion]] = [[] for _ in prompts]
    for piece in pieces:
        for row, part in enumerate(piece):
            if row in done:
                continue
            parts[row].append(part)
            answer = join(parts[row])
            text, reason = (
                continuation(session.need_tokenizer(), prompts[row], answer.content),
                part.finish_reason,
            )
            if ends := [text.find(stop) for stop in stops if stop in text]:
                text, reason = text[: min(ends)], "stop"
            if reason:
                done[row] = dataclasses.replace(answer, text=text, finish_reason=reason)
        if len(done) == len(prompts):
            break
    return [done[row] for row in range(len(prompts))]
