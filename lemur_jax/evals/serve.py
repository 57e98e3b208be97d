"""`lemur serve`: the smallest endpoint that OpenAI's client and what is built on it can talk to.

For smoke tests and for harnesses that speak HTTP; for production, serve the exported directory with vLLM.
One request is on the devices at a time. Not there: several answers to a prompt, top log-probabilities,
tools, embeddings, keys.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.data.chat import encode_chat
from lemur_jax.infer.complete import Text, complete
from lemur_jax.infer.generate import stream
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.score import score
from lemur_jax.infer.session import Session, stop_ids
from lemur_jax.infer.text import stream_text

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
        prompts = [self._ids(prompt) for prompt in _prompts(body)]
        if body.get("stream"):
            if len(prompts) != 1:
                raise UserError("stream one prompt at a time")
            return self._stream(body, prompts[0], "text_completion", lambda text: {"text": text})
        return await run_in_threadpool(self._complete, body, prompts)

    async def chat(self, request: Request):
        body = await _body(request)
        prompt, _ = encode_chat(self.tokenizer, body.get("messages") or [], add_generation_prompt=True)
        if body.get("stream"):
            return self._stream(
                body, prompt, "chat.completion.chunk", lambda text: {"delta": {"content": text}}
            )
        return await run_in_threadpool(self._chat, body, prompt)

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
        with self.busy:
            only_score = body.get("max_tokens") == 0  # the prompt, with echo
            answers = [nothing for _ in prompts] if only_score else self._answers(body, prompts, 16)
            choices = [
                self._choice(index, body, prompt, answer)
                for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
        return self._response("text_completion", "cmpl", choices, prompts, answers)

    def _choice(self, index: int, body: Json, prompt: list[int], answer: Text) -> Json:
        tokens, text = list(answer.tokens), answer.text
        logprobs: list[float | None] = list(answer.logprobs)
        if body.get("echo"):
            text = self.tokenizer.decode(prompt, skip_special=True) + text
            tokens = prompt + tokens
            if body.get("logprobs") is not None:
                before = score(self.session, [(prompt[:1], prompt[1:])])[0].logprobs if prompt[1:] else ()
                logprobs = [None, *before, *logprobs]
        told: Json | None = None
        if body.get("logprobs") is not None:
            spelled = [self.tokenizer.token(token) for token in tokens]
            told = {"tokens": spelled, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": None}
        return {"index": index, "text": text, "logprobs": told, "finish_reason": answer.finish_reason}

    def _chat(self, body: Json, prompt: list[int]) -> JSONResponse:
        with self.busy:
            (answer,) = self._answers(body, [prompt], 256)
        told: Json | None = None
        if body.get("logprobs"):
            told = {
                "content": [
                    {
                        "token": self.tokenizer.token(token),
                        "logprob": value,
                        "bytes": None,
                        "top_logprobs": [],
                    }
                    for token, value in zip(answer.tokens, answer.logprobs, strict=True)
                ]
            }
        message = {"role": "assistant", "content": answer.text}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": told,
            "finish_reason": answer.finish_reason,
        }
        return self._response("chat.completion", "chatcmpl", [choice], [prompt], [answer])

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
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        raise UserError("one answer to a prompt: n and best_of must be 1")
    return body


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
