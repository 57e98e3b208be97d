"""Reads the requests of `lemur serve`, within limits; a bad request gets a status of 4xx."""

import asyncio
import json
import secrets
import urllib.parse
from collections.abc import Sequence, Set
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from lemur_jax.common.errors import UserError
from lemur_jax.infer.sampling import Sampling
from lemur_jax.text.chat_template import THOUGHTS
from lemur_jax.text.conversation_formats import openai_messages

Json = dict[str, Any]
Number = TypeVar("Number", int, float)

# OpenAI's own limits for n and logprobs are 128 and 20.
MAX_ANSWERS, MAX_TOP_LOGPROBS, MAX_STOPS = 64, 20, 64
MOST_BYTES, BODY_SECONDS = 4 << 20, 30.0
# Fields that the routes read, and those that change no answer. Others would, if they were ignored: they are refused,
# unless their value is null, or one that asks for what is done anyway.
_READ = {
    "max_tokens", "max_completion_tokens", "n", "best_of", "stop", "stream", "stream_options", "logprobs", "seed",
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
}  # fmt: skip
COMPLETION_FIELDS = {*_READ, "prompt", "echo"}
CHAT_FIELDS = {*_READ, "messages", "top_logprobs", "chat_template_kwargs"}
_WITHOUT_EFFECT = {
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id",
    "parallel_tool_calls", "priority",
}  # fmt: skip
# Fields of a message of any role, and of some roles.
_MESSAGE_FIELDS = {"role", "content", "name"}
_ROLE_FIELDS = {"assistant": {"tool_calls", "function_call", *THOUGHTS}, "tool": {"tool_call_id"}}
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_DONE_ANYWAY = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "length_penalty": (1,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "detokenize": (True,),
    "include_reasoning": (True,),
}


def check_host(request: Request, hosts: Sequence[str] | None) -> None:
    """Refuses requests to another host name, and those of other sites' web pages."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if hosts is not None and _hostname(f"//{host}") not in hosts:
        raise HTTPException(403, f"this server is not {host[:100]!r}: ask {', '.join(hosts)}")
    if origin is not None and _hostname(origin) not in (hosts or ()):
        raise HTTPException(403, "web pages of other sites may not use this server")


async def read_body(request: Request, hosts: Sequence[str] | None, fields: Set[str]) -> Json:
    """The request's JSON object; UserError or HTTPException if it is invalid, too large, too slow or not allowed.

    `fields` are those that the route reads.
    """
    check_host(request, hosts)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(415, f"the content type is {kind[:100]!r}: it must be application/json")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise HTTPException(413, f"the request has more than {MOST_BYTES} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"the request was not complete after {BODY_SECONDS:.0f} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the request is not complete") from error
    try:
        body = await run_in_threadpool(json.loads, data.decode(), parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode()  # fails on lone surrogates
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is not JSON: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise UserError("the request must be a JSON object")
    _check_fields(body, fields | _WITHOUT_EFFECT)
    return body


def _check_fields(given: Json, known: Set[str], where: str = "") -> None:
    """Raises UserError for a field outside `known` that asks for something."""
    for field, value in given.items():
        asks = value not in _EMPTY and value not in _DONE_ANYWAY.get(field, (False, 0))
        if asks and field not in known:
            raise UserError(f"{where}{field:.50} is not supported: leave it out")


async def disconnect(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _hostname(url: str) -> str | None:
    try:
        return urllib.parse.urlsplit(url).hostname
    except ValueError:
        return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def answers_wanted(body: Json) -> int:
    count = number(body, "n", 1, 1, MAX_ANSWERS)
    if body.get("best_of") not in (None, count):
        raise UserError(f"n is {count}: best_of must be the same")
    return count


def stream_wanted(body: Json, answers: int) -> bool:
    """Whether to stream; UserError for what a stream does not have, or what only a stream has."""
    options = object_of(body, "stream_options")
    _check_fields(options, {"include_usage"}, "stream_options.")
    if not flag(body, "stream"):
        if options:
            raise UserError("stream_options needs stream: true")
        return False
    if answers != 1:
        raise UserError("stream one answer to one prompt at a time")
    for field in ("echo", "logprobs"):
        if (value := body.get(field)) is not None and value is not False:
            raise UserError(f"a stream has no {field}: leave out {field} or stream")
    return True


def object_of(body: Json, key: str) -> Json:
    value = body.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{key} is {value!r:.50}: it must be an object")
    return value


def prompts_of(body: Json) -> list[str | list[int]]:
    """OpenAI's four forms: a text, texts, ids, or lists of ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]

    def valid(item) -> bool:
        ids = item and isinstance(item, list) and all(type(token) is int for token in item)
        return isinstance(item, str) or bool(ids)

    if not isinstance(prompt, list) or not prompt or not all(map(valid, prompt)):
        raise UserError("prompt must be a text, a list of texts, token ids, or lists of token ids")
    return prompt


def messages_of(body: Json) -> list[Json]:
    """The conversation; contents may be lists of text parts."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("name") or "", str):
            raise UserError(f"messages[{index}] is {message!r:.50}: it must be an object, its name a string")
        known = _MESSAGE_FIELDS | _ROLE_FIELDS.get(str(message.get("role")), set())
        _check_fields(message, known, f"messages[{index}].")
    try:
        return openai_messages(messages)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"messages: {error}") from error


def stops(body: Json) -> list[str]:
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    strings = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    if not strings or len(stops) > MAX_STOPS:
        raise UserError(f"stop must be a string or a list of at most {MAX_STOPS} strings")
    return [stop for stop in stops if stop]


def sampling_of(body: Json) -> tuple[Sampling, int]:
    """How tokens are drawn, and the seed of the first answer."""
    seed = number(body, "seed", secrets.randbits(32), -(2**63), 2**63)
    top_k = number(body, "top_k", 0, -1, 2**31)
    sampling = Sampling(
        temperature=number(body, "temperature", 1.0, 0.0, 100.0),  # OpenAI's default
        top_p=number(body, "top_p", 1.0, 0.0, 1.0),
        top_k=max(0, top_k),  # -1 is vLLM's word for all
        min_p=number(body, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=number(body, "repetition_penalty", 1.0, 0.0, 100.0),
        seed=seed % 2**32,
    )
    return sampling, seed


def number(body: Json, key: str, default: Number, low: float, high: float) -> Number:
    """A number of the type of `default`, which stands for null; UserError if it is none or out of range."""
    value = body.get(key)
    if value is None:
        return default
    whole = type(default) is int
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        raise UserError(f"{key} is {value!r:.50}: it must be {kind} between {low} and {high}")
    return type(default)(value)


def flag(body: Json, key: str) -> bool:
    value = body.get(key)
    if value is not None and type(value) is not bool:
        raise UserError(f"{key} is {value!r:.50}: it must be true or false")
    return bool(value)
