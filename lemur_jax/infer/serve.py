"""`lemur serve`: a small endpoint for OpenAI's client and for harnesses that speak HTTP.

One thread runs the model on all requests at a time (`infer/engine.py`); scoring runs between its steps. A request whose
client has left is dropped. Not supported: tools of a request (calls in an answer are text), several answers or
log-probabilities in one stream, embeddings and keys. For production, serve the exported directory with vLLM.
"""

import asyncio
import contextlib
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.infer.chat import Options
from lemur_jax.infer.complete import answers, pieces, with_text
from lemur_jax.infer.engine import Engine, check_ids, check_request
from lemur_jax.infer.engine import Request as Generation
from lemur_jax.infer.generate import Completion, make_requests
from lemur_jax.infer.score import score
from lemur_jax.infer.serve_requests import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MAX_TOP_LOGPROBS,
    Json,
    answers_wanted,
    check_host,
    disconnect,
    flag,
    messages_of,
    number,
    object_of,
    prompts_of,
    read_body,
    sampling_of,
    stops,
    stream_wanted,
)
from lemur_jax.infer.serve_worker import END, Job, Worker
from lemur_jax.infer.session import Session
from lemur_jax.infer.text import offsets, spelled
from lemur_jax.text.chat_template import stop_ids

logger = logging.getLogger(__name__)

AnswerSpec = tuple[list[Generation], list[str]]  # with the strings that end an answer

MOST_PROMPTS = 256  # of one request, n counted
# A prompt with more characters for each position of the model is refused before it is tokenized.
CHARACTERS_A_TOKEN = 64
STOP_SECONDS = 30  # for answers in progress when the server is stopped
ANSWER_SECONDS = 600.0  # until an answer, or the first part of a stream; time in the queue included


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address of this machine; port 0: any free one. UserError: it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({reason_of(error)}): name another --host or --port"
        ) from error


def serve(
    session: Session,
    name: str,
    listening: socket.socket,
    *,
    host: str,
    chat_template_kwargs: Json | None = None,
) -> None:
    """Answers requests on the socket of `listen(host, ...)` until interrupted; see `application`."""
    address = f"[{host}]" if ":" in host else host
    logger.info("serving %s at http://%s:%s/v1", name, address, listening.getsockname()[1])
    # With one address, another name in `Host` belongs to a web page whose name resolves to it (DNS rebinding).
    any_address = host in ("0.0.0.0", "::", "")
    hosts = None if any_address else (host, "localhost", "127.0.0.1", "::1")
    app = application(session, name, hosts, chat_template_kwargs)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS)
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        app.state.worker.stop()


def application(
    session: Session, name: str, hosts: Sequence[str] | None = None, chat_template_kwargs: Json | None = None
) -> Starlette:
    """The ASGI application.

    Args:
      hosts: accepted names in `Host` and `Origin`; None: any `Host`, and no `Origin`.
      chat_template_kwargs: variables of the chat template, for requests that do not set them.
    """
    server = _Server(session, name, hosts, chat_template_kwargs or {})
    app = Starlette(
        routes=[
            Route("/v1/models", server.models, methods=["GET"]),
            Route("/v1/models/{name:path}", server.models, methods=["GET"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys((UserError, HTTPException, Exception), _refuse),
    )
    app.state.worker = server.worker
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    status = 400 if isinstance(error, UserError) else getattr(error, "status_code", 500)
    return JSONResponse(_error(error), status_code=status)


def _error(error: Exception) -> Json:
    text, kind = f"{type(error).__name__}: {error}", "server_error"
    if isinstance(error, UserError | HTTPException):
        text, kind = getattr(error, "detail", str(error)), "invalid_request_error"
    # In ASCII: a client's text may be in the message.
    text = text[:500].encode("ascii", "backslashreplace").decode()
    return {"error": {"message": text, "type": kind, "param": None, "code": None}}


def _usage(prompts: Sequence[Sequence[int]], answers: Sequence[Completion]) -> Json:
    num_prompt, num_new = sum(map(len, prompts)), sum(len(answer.content) for answer in answers)
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


class _Server:
    """The three routes over one session."""

    def __init__(self, session: Session, name: str, hosts: Sequence[str] | None, template_kwargs: Json):
        self.session, self.name, self.template_kwargs = session, name, template_kwargs
        self.hosts = hosts and [host.lower() for host in hosts]  # as `urlsplit` gives the names of requests
        self.tokenizer = session.need_tokenizer()
        self.worker = Worker(session)

    async def models(self, request: Request) -> Response:
        check_host(request, self.hosts)
        name = request.path_params.get("name", "")
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "lemur_jax"}
        if name not in ("", self.name):
            raise HTTPException(404, f"there is no model {name!r:.100}, only {self.name!r}")
        return JSONResponse(model if name else {"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, self.hosts, COMPLETION_FIELDS)
        copies = answers_wanted(body)
        texts = prompts_of(body)
        if len(texts) * copies > MOST_PROMPTS:
            raise UserError(
                f"{len(texts)} prompts with n {copies}: one request may have {MOST_PROMPTS} answers"
            )
        ids = await run_in_threadpool(lambda: [self._ids(text) for text in texts])
        prompts = [prompt for prompt in ids for _ in range(copies)]
        echo, top, streamed = flag(body, "echo"), None, stream_wanted(body, len(prompts))
        if body.get("logprobs") is not None and body["logprobs"] is not False:
            top = number(body, "logprobs", 0, 0, MAX_TOP_LOGPROBS)
        # With max_tokens 0 nothing is generated: the prompt is scored.
        asked = self._asked(body, prompts, 16, least=int(streamed))
        if streamed:
            return await self._stream(request, body, asked, "text_completion")

        def work(engine: Engine) -> Generator[Json | None]:
            completions = [Completion(tokens=(), logprobs=(), finish_reason="length")] * len(prompts)
            if asked[0]:
                completions = yield from self._answers(engine, asked)
            choices = []
            for index, (prompt, answer) in enumerate(zip(prompts, completions, strict=True)):
                yield None  # other clients' answers go on between two prompts that are scored
                text = self.tokenizer.decode(prompt if echo else [], skip_special=True) + answer.text
                shown = None if top is None else self._logprobs(prompt, echo, answer, text, top)
                reason = answer.finish_reason
                choices.append({"index": index, "text": text, "logprobs": shown, "finish_reason": reason})
            yield self._response("text_completion", choices, prompts[::copies], completions)

        return JSONResponse(await self._first(request, Job(work)))

    async def chat(self, request: Request) -> Response:
        body = await read_body(request, self.hosts, CHAT_FIELDS)
        copies, top = answers_wanted(body), number(body, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
        with_logprobs = flag(body, "logprobs")
        if top and not with_logprobs:
            raise UserError("top_logprobs needs logprobs: true")
        messages = messages_of(body)
        self._check_length(sum(len(message["content"]) for message in messages))
        kwargs = {**self.template_kwargs, **object_of(body, "chat_template_kwargs")}
        encode = Options(chat_template_kwargs=kwargs).encode
        prompt = await run_in_threadpool(encode, self.tokenizer, messages)
        asked = self._asked(body, [prompt] * copies, 256)
        if stream_wanted(body, copies):
            return await self._stream(request, body, asked, "chat.completion.chunk")

        def work(engine: Engine) -> Generator[Json | None]:
            completions = yield from self._answers(engine, asked)
            prompts = [generation.prompt for generation in asked[0]]
            choices = [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text},
                    "logprobs": self._chat_logprobs(prompt, answer, top) if with_logprobs else None,
                    "finish_reason": answer.finish_reason,
                }
                for index, (prompt, answer) in enumerate(zip(prompts, completions, strict=True))
            ]
            yield self._response("chat.completion", choices, prompts[:1], completions)

        return JSONResponse(await self._first(request, Job(work)))

    def _check_length(self, characters: int) -> None:
        max_length = self.session.model.max_position_embeddings
        if characters > CHARACTERS_A_TOKEN * max_length:
            raise UserError(
                f"the prompt has {characters} characters, too many for the model's {max_length} tokens"
            )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        """Ids as they are; text with its control tokens, after the tokenizer's bos."""
        if not isinstance(prompt, str):
            check_ids(self.session, "the prompt", prompt)
            return prompt
        self._check_length(len(prompt))
        return self.tokenizer.encode_prompt(prompt, control_tokens=True)

    def _asked(self, body: Json, prompts: list[list[int]], default: int, least: int = 1) -> AnswerSpec:
        """What to generate, checked.

        Args:
          default: most tokens if the client names no number, or what there is space for.
          least: that the client may name; 0 is a list of no requests.
        """
        max_length = self.session.model.max_position_embeddings
        key, other = "max_tokens", "max_completion_tokens"
        if body.get(key) is None:
            key, other = other, key
        if body.get(other) not in (None, body.get(key)):
            raise UserError(f"{key} and {other} differ: give one of them")
        space = max_length - max(map(len, prompts))
        limit = number(body, key, max(1, min(default, space)), least, max_length)
        sampling, seed = sampling_of(body)
        prompts = prompts if limit else []
        for prompt in prompts:
            check_request(self.session, "the prompt", prompt, limit)
        seeds = [seed + index for index in range(len(prompts))]
        return make_requests(prompts, limit, stop_ids(self.tokenizer), sampling, seeds), stops(body)

    async def _first(self, request: Request, job: Job) -> Any:
        """The job's first result; the job is dropped if it is late or the client leaves."""
        result = asyncio.ensure_future(job.result())
        gone = asyncio.ensure_future(disconnect(request))
        try:
            self.worker.add(job)
            await asyncio.wait({result, gone}, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if gone.done():
                raise HTTPException(499, "the client has left")
            raise HTTPException(503, f"there is no answer after {ANSWER_SECONDS:.0f} s")
        finally:
            job.dropped = not (result.done() and not result.cancelled())
            result.cancel()
            gone.cancel()

    async def _stream(self, request: Request, body: Json, asked: AnswerSpec, kind: str) -> Response:
        (generation,), stop_strings = asked
        head, with_usage = self._head(kind), flag(object_of(body, "stream_options"), "include_usage")
        if with_usage:
            head["usage"] = None  # in all chunks but the last, which has no choices

        def event(chunk: Json) -> str:
            return f"data: {json.dumps(head | chunk)}\n\n"

        def work(engine: Engine) -> Generator[tuple[str, str] | Json | None]:
            yield from pieces(self.session, engine, engine.submit(generation), stop_strings)
            if with_usage:
                yield _usage([generation.prompt], [with_text(self.session, generation, stop_strings)])

        job = Job(work)
        first_chunk = await self._first(request, job)

        async def events() -> AsyncIterator[str]:
            chunk, role = first_chunk, {"role": "assistant"}
            try:
                while chunk is not END:
                    if isinstance(chunk, dict):
                        yield event({"choices": [], "usage": chunk})
                    else:
                        text, reason = chunk
                        is_text = kind == "text_completion"
                        delta = {"text": text} if is_text else {"delta": role | {"content": text}}
                        choice = {"index": 0, "logprobs": None, "finish_reason": reason or None}
                        yield event({"choices": [choice | delta]})
                        role = {}
                    chunk = await job.result()
                yield "data: [DONE]\n\n"
            except Exception as error:  # the status is already sent
                yield f"data: {json.dumps(_error(error))}\n\n"
            finally:  # also where the client leaves, and this is cancelled
                job.dropped = True

        return StreamingResponse(events(), media_type="text/event-stream")

    def _answers(self, engine: Engine, asked: AnswerSpec) -> Generator[None, None, list[Completion]]:
        generations, stop_strings = asked
        return answers(self.session, engine, [*map(engine.submit, generations)], stop_strings)

    def _logprobs(self, prompt: list[int], echo: bool, answer: Completion, text: str, top: int) -> Json:
        """Log-probabilities as completions have them; the first token of an echoed prompt has none."""
        asked, context = (prompt, prompt[:1]) if echo else ([], prompt)
        tokens, logprobs = [*asked[1:], *answer.content], list(answer.logprobs[: len(answer.content)])
        if asked[1:]:
            logprobs = [*score(self.session, [(context, asked[1:])])[0].logprobs, *logprobs]
        tops = self._tops(context, tokens, logprobs, top)

        def by_text(top: dict[int, float]) -> dict[str, float]:
            entries: dict[str, float] = {}
            for token, value in top.items():
                # The likeliest of those with one text.
                entries.setdefault(spelled(self.tokenizer, token)[0], value)
            return entries

        none = [None] * len(asked[:1])
        return {
            "tokens": [spelled(self.tokenizer, token)[0] for token in [*asked[:1], *tokens]],
            "token_logprobs": [*none, *logprobs],
            "top_logprobs": [*none, *map(by_text, tops)] if top else None,
            "text_offset": offsets(self.tokenizer, asked, answer.content, text),
        }

    def _chat_logprobs(self, prompt: Sequence[int], answer: Completion, top: int) -> Json:
        """Log-probabilities as chat completions have them."""

        def entry(token: int, value: float) -> Json:
            text, data = spelled(self.tokenizer, token)
            return {"token": text, "logprob": value, "bytes": list(data)}

        tokens = list(answer.content)
        logprobs = list(answer.logprobs[: len(tokens)])
        tops = self._tops(prompt, tokens, logprobs, top)
        return {
            "content": [
                entry(token, value) | {"top_logprobs": [entry(*item) for item in likeliest.items()]}
                for token, value, likeliest in zip(tokens, logprobs, tops, strict=True)
            ]
        }

    def _tops(
        self, context: Sequence[int], tokens: list[int], logprobs: list[float], count: int
    ) -> list[dict[int, float]]:
        """The `count` likeliest ids at each token; the token itself keeps the value that was reported."""
        if not count or not tokens:
            return [{} for _ in tokens]
        count = min(count, self.session.model.vocab_size)
        tops = score(self.session, [(context, tokens)], top=count)[0].top
        return [
            top | ({token: value} if token in top else {})
            for top, token, value in zip(tops, tokens, logprobs, strict=True)
        ]

    def _response(self, kind: str, choices, prompts, answers) -> Json:
        return self._head(kind) | {"choices": choices, "usage": _usage(prompts, answers)}

    def _head(self, kind: str) -> Json:
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind}
        return head | {"created": int(time.time()), "model": self.name}
