"""Text completions that end at stop strings, whole or in pieces."""

import bisect
import dataclasses
from collections.abc import Generator, Sequence

from lemur_jax.infer.engine import SLOTS, Engine, Request
from lemur_jax.infer.generate import Completion, completion, make_engine, make_requests
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session
from lemur_jax.infer.text import INCOMPLETE, continuation, num_settled_tokens
from lemur_jax.text.chat_template import stop_ids


def complete(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    batch_tokens: int = SLOTS,
) -> list[Completion]:
    """Continues every prompt until a stop id, a stop string or `max_new_tokens`; prompts too long lose their beginning.

    Args:
      prompts: ids, none of them empty.
      stops: strings that end an answer; `text` ends before the first, `tokens` with the one that completes it.
      seeds: one for each prompt; default its index.
      batch_tokens: as `slots` of the engine.

    Raises:
      UserError: there is no tokenizer, or `max_new_tokens` leave no space for a prompt.
    """
    max_prompt = max(1, session.model.max_position_embeddings - max_new_tokens)
    prompts, stop_tokens = [prompt[-max_prompt:] for prompt in prompts], stop_ids(session.need_tokenizer())
    requests = make_requests(prompts, max_new_tokens, stop_tokens, sampling, seeds)
    return finish(session, make_engine(session, requests, batch_tokens), requests, stops)


def finish(
    session: Session, engine: Engine, requests: Sequence[Request], stops: Sequence[str] = ()
) -> list[Completion]:
    """Runs an engine until these requests, which it has, are answered."""
    generator = answers(session, engine, requests, stops)
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
        engine.step()


def answers(
    session: Session, engine: Engine, requests: Sequence[Request], stops: Sequence[str] = ()
) -> Generator[None, None, list[Completion]]:
    """The completions of requests that were submitted; yields whenever the engine must make a step.

    If it is closed before its end, it cancels the requests.
    """
    completions: dict[int, Completion] = {}
    try:
        while len(completions) < len(requests):
            yield
            for index, request in enumerate(requests):
                if index not in completions and request.tokens and (request.finish_reason or stops):
                    answer = with_text(session, request, stops)
                    if answer.finish_reason:
                        engine.cancel(request)
                        completions[index] = answer
        return list(map(completions.__getitem__, range(len(requests))))
    finally:
        for request in requests:
            engine.cancel(request)


def pieces(
    session: Session, engine: Engine, request: Request, stops: Sequence[str] = ()
) -> Generator[tuple[str, str] | None]:
    """(text, "") for each piece of an answer, then ("", finish reason); None whenever the engine must make a step.

    The possible beginning of a stop string is held back. If it is closed before its end, it cancels the request.
    """
    sent, margin = 0, max(map(len, stops), default=1) - 1
    try:
        while True:
            yield None
            answer = with_text(session, request, stops)
            text = answer.text
            if not answer.finish_reason:
                text = text[: max(0, len(text) - margin)]
            if len(text) > sent:
                yield text[sent:], ""
                sent = len(text)
            if answer.finish_reason:
                yield "", answer.finish_reason
                return
    finally:
        engine.cancel(request)


def with_text(session: Session, request: Request, stops: Sequence[str] = ()) -> Completion:
    """The completion of a request so far, with its text up to the first stop string, which ends it.

    The tokens end with the one that completes a stop string: how many follow depends on other requests.
    `text` of an unfinished answer lacks what later tokens can change: byte tokens and an incomplete character.
    """
    answer, tokenizer = completion(request), session.need_tokenizer()
    tokens, stops = answer.content, [stop for stop in stops if stop]

    def text_of(count: int) -> str:
        start, text = request.decoded if count >= request.decoded[0] else (0, "")
        return text + continuation(tokenizer, [*request.prompt, *tokens[:start]], tokens[start:count])

    def stopped(text: str) -> bool:
        stable = text.rstrip(INCOMPLETE)  # without an incomplete character at the end
        return any(stop in stable for stop in stops)

    num_settled = len(tokens) if answer.finish_reason else num_settled_tokens(tokenizer, tokens)
    text = text_of(num_settled)
    if not stopped(text):
        if not text.endswith(INCOMPLETE):
            request.decoded = num_settled, text
        return dataclasses.replace(answer, text=text if answer.finish_reason else text.rstrip(INCOMPLETE))
    first = bisect.bisect_left(
        range(num_settled),
        True,
        key=lambda count: stopped(text_of(num_settled_tokens(tokenizer, tokens[:count]))),
    )
    # A byte token may complete it, in a run of byte tokens that ends later.
    counts = range(num_settled_tokens(tokenizer, tokens[: first - 1]) + 1, first + 1)
    count = next(count for count in counts if stopped(text_of(count)))
    text = text_of(count)
    return dataclasses.replace(
        answer,
        tokens=answer.tokens[:count],
        logprobs=answer.logprobs[:count],
        text=text[: min(text.find(stop) for stop in stops if stop in text)],
        finish_reason="stop",
        stop_id=False,
    )
