"""`lemur serve`: the smallest endpoint that OpenAI's client and what is built on it can talk to.

For smoke tests and for harnesses that speak HTTP; for production, serve the exported directory with vLLM.
One request is on the devices at a time. Not there: tools (calls are text, `agents/tools.py`), several answers in
one stream, embeddings, keys.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.infer.complete import Text, complete
from lemur_jax.infer.generate import stream
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.score import score, top_logprobs
from lemur_jax.infer.session import Session
from lemur_jax.infer.text import stream_text
from lemur_jax.text.chat_template import encode_chat, stop_ids

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise UserError(
        f"serving needs starlette and uvicorn ({error}): pip install 'lemur_jax[eval]'"
    ) from error

Json = dict[str, Any]
MOST_ANSWERS, MOST_TOP = 64, 20  # of one request; OpenAI's own limits are 128 and 20


def serve(session: Session, name: str, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answers requests until interrupted.

    Raises:
      UserError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("serving needs uvicorn: pip install 'lemur_jax[eval]'") from error
    print(f"serving {name} at http://{host}:{port}/v1", flush=True)
    uvicorn.run(application(session, name), host=host, port=port, log_level="warning")


def application(session: Session, name: str) -> Starlette:
    """The ASGI application."""
    server = _Server(session, name)
    return Starlette(
        routes=[
            Route("/v1/models", server.models, methods=["GET"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ],
        exception_handlers={UserError: _refuse},
    )


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)


class _Server:
    """The three routes over one session."""

    def __init__(self, session: Session, name: str):
        self.session, self.name = session, name
        self.tokenizer = session.need_tokenizer()
        self.busy = threading.Lock()

    async def models(self, request: Request) -> JSONResponse:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "lemur_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request):
        body = await _body(request)
        prompts = [ids for prompt in _prompts(body) for ids in [self._ids(prompt)] * _answers_wanted(body)]
        if body.get("stream"):
            if len(prompts) != 1:
                raise UserError("stream one answer to one prompt at a time")
            return self._stream(body, prompts[0], "text_completion", lambda text: {"text": text})
        return await run_in_threadpool(self._complete, body, prompts)

    async def chat(self, request: Request):
        body = await _body(request)
        prompt, _ = encode_chat(self.tokenizer, body.get("messages") or [], add_generation_prompt=True)
        wanted = _answers_wanted(body)
        if body.get("stream"):
            if wanted != 1:
                raise UserError("stream one answer to one prompt at a time")
            return self._stream(
                body, prompt, "chat.completion.chunk", lambda text: {"delta": {"content": text}}
            )
        return await run_in_threadpool(self._chat, body, [prompt] * wanted)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Text gets a bos, ids are taken as they are."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        return list(prompt)

    def _answers(self, body: Json, prompts: list[list[int]], default: int) -> list[Text]:
        limit = _number(body, "max_tokens", body.get("max_completion_tokens") or default)
        for prompt in prompts:
            if len(prompt) + limit > (longest := self.session.model.max_position_embeddings):
                raise UserError(
                    f"{len(prompt)} tokens of prompt and max_tokens {limit} are more than the model's {longest}"
                )
        seed = _number(body, "seed", 0)
        return complete(
            self.session,
            prompts,
            max_new_tokens=limit,
            stops=_stops(body),
            sampling=_sampling(body),
            seeds=[seed + index for index in range(len(prompts))],
        )

    def _complete(self, body: Json, prompts: list[list[int]]) -> JSONResponse:
        nothing = Text(text="", tokens=(), logprobs=(), finish_reason="length")
        count = body.get("logprobs")
        with self.busy:
            only_score = body.get("max_tokens") == 0  # the prompt, with echo
            answers = [nothing for _ in prompts] if only_score else self._answers(body, prompts, 16)
            choices = []
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                text, tokens, logprobs = answer.text, list(answer.tokens), list(answer.logprobs)
                first = prompt[:0]
                if body.get("echo"):
                    first, text = prompt[:1], self.tokenizer.decode(prompt, skip_special=True) + text
                    tokens = prompt[1:] + tokens
                    if count is not None and prompt[1:]:
                        logprobs = [*score(self.session, [(first, prompt[1:])])[0].logprobs, *logprobs]
                told = None
                if count is not None:
                    told = self._told(first, first or prompt, tokens, logprobs, _number(body, "logprobs", 0))
                choices.append(
                    {"index": index, "text": text, "logprobs": told, "finish_reason": answer.finish_reason}
                )
        return self._response("text_completion", "cmpl", choices, prompts, answers)

    def _told(
        self, first: list[int], before: list[int], tokens: list[int], logprobs: list[float], count: int
    ) -> Json:
        """Log-probabilities as completions have them; the first token of an echoed prompt has none."""
        tops = self._tops(before, tokens, logprobs, count)
        spelled = [{self.tokenizer.token(id): value for id, value in top.items()} for top in tops]
        none = [None] * len(first)
        return {
            "tokens": [self.tokenizer.token(token) for token in [*first, *tokens]],
            "token_logprobs": [*none, *logprobs],
            "top_logprobs": [*none, *spelled] if count else None,
            "text_offset": None,
        }

    def _tops(
        self, before: list[int], tokens: list[int], logprobs: list[float], count: int
    ) -> list[dict[int, float]]:
        """The `count` likeliest ids at each token; that of the token itself is the one told for it."""
        if not count or not tokens:
            return [{} for _ in tokens]
        (tops,) = top_logprobs(self.session, [(before, tokens)], count)
        for top, token, value in zip(tops, tokens, logprobs, strict=True):
            if token in top:
                top[token] = value
        return tops

    def _chat(self, body: Json, prompts: list[list[int]]) -> JSONResponse:
        with self.busy:
            answers = self._answers(body, prompts, 256)
            choices = [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text},
                    "logprobs": self._told_chat(body, prompt, answer) if body.get("logprobs") else None,
                    "finish_reason": answer.finish_reason,
                }
                for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
        return self._response("chat.completion", "chatcmpl", choices, prompts[:1], answers)

    def _told_chat(self, body: Json, prompt: list[int], answer: Text) -> Json:
        """Log-probabilities as chat completions have them."""

        def entry(token: int, value: float) -> Json:
            return {"token": self.tokenizer.token(token), "logprob": value, "bytes": None}

        tokens, logprobs = list(answer.tokens), list(answer.logprobs)
        tops = self._tops(prompt, tokens, logprobs, _number(body, "top_logprobs", 0))
        return {
            "content": [
                entry(token, value) | {"top_logprobs": [entry(*one) for one in top.items()]}
                for token, value, top in zip(tokens, logprobs, tops, strict=True)
            ]
        }

    def _response(self, kind: str, prefix: str, choices, prompts, answers) -> JSONResponse:
        asked, given = sum(map(len, prompts)), sum(len(answer.tokens) for answer in answers)
        usage = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
        return JSONResponse(self._head(kind, prefix) | {"choices": choices, "usage": usage})

    def _head(self, kind: str, prefix: str) -> Json:
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    def _stream(self, body: Json, prompt: list[int], kind: str, delta) -> StreamingResponse:
        # Checked here: once the first byte is out there is no refusing any more.
        sampling, stops = _sampling(body), _stops(body)
        limit = _number(body, "max_tokens", body.get("max_completion_tokens") or 256)
        room = self.session.model.max_position_embeddings - len(prompt)
        if not 1 <= limit <= room:
            raise UserError(f"max_tokens is {limit}: it must be between 1 and {room} for this prompt")
        head = self._head(kind, "stream")
        seed = _number(body, "seed", 0)

        def events() -> Iterator[str]:
            reason = ""

            def ids():
                nonlocal reason
                pieces = stream(
                    self.session,
                    [prompt],
                    max_new_tokens=limit,
                    stop_ids=stop_ids(self.tokenizer),
                    sampling=sampling,
                    seeds=[seed],
                )
                for (piece,) in pieces:
                    reason = piece.finish_reason
                    yield piece.content

            def event(change: Json, finish: str | None) -> str:
                choice = {"index": 0, "logprobs": None, "finish_reason": finish, **change}
                return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

            with self.busy, contextlib.closing(ids()) as pieces:
                for text in until(stream_text(self.tokenizer, prompt, pieces), stops):
                    yield event(delta(text), None)
            yield event(delta(""), reason or "stop")
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Text in pieces up to the first stop string; what may yet become one is held back."""
    held = ""
    margin = max(map(len, stops), default=1) - 1
    for piece in pieces:
        held += piece
        ends = [held.find(stop) for stop in stops if stop in held]
        if ends:
            if min(ends):
                yield held[: min(ends)]
            return
        if len(held) > margin:
            yield held[: len(held) - margin]
            held = held[len(held) - margin :]
    if held:
        yield held


async def _body(request: Request) -> Json:
    try:
        body = await request.json()
    except ValueError as error:
        raise UserError(f"the request is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise UserError("the request must be a JSON object")
    for key in ("logprobs", "top_logprobs"):
        count = body.get(key)
        if (
            count is not None
            and type(count) is not bool
            and not (type(count) is int and 0 <= count <= MOST_TOP)
        ):
            raise UserError(f"{key} is {count!r}: it must be between 0 and {MOST_TOP}")
    return body


def _answers_wanted(body: Json) -> int:
    wanted = _number(body, "n", 1)
    if not 1 <= wanted <= MOST_ANSWERS or body.get("best_of") not in (None, wanted):
        raise UserError(f"n is {wanted}: it must be between 1 and {MOST_ANSWERS}, and best_of the same")
    return wanted


def _prompts(body: Json) -> list[str | list[int]]:
    """OpenAI's four forms: a text, texts, ids, or lists of ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]

    def fine(item) -> bool:
        return isinstance(item, str) or (
            isinstance(item, list) and bool(item) and all(type(token) is int for token in item)
        )

    if not isinstance(prompt, list) or not prompt or not all(map(fine, prompt)):
        raise UserError("prompt must be a text, a list of texts, token ids, or lists of token ids")
    return prompt


def _stops(body: Json) -> list[str]:
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise UserError("stop must be a string or a list of strings")
    return [stop for stop in stops if stop]


def _sampling(body: Json) -> Sampling:
    temperature, top_p = body.get("temperature"), body.get("top_p")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value is not None and not isinstance(value, int | float):
            raise UserError(f"{name} is {value!r}: it must be a number")
    return Sampling(
        temperature=1.0 if temperature is None else temperature,  # OpenAI's default
        top_p=1.0 if top_p is None else top_p,
        seed=_number(body, "seed", 0) % 2**32,
    )


def _number(body: Json, key: str, default: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise UserError(f"{key} is {value!r}: it must be an integer")
    return value
