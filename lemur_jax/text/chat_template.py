"""Conversations to token ids with a loss mask, through the tokenizer's Jinja chat template.

The template says which text is supervised (`{% generation %} ... {% endgeneration %}`, as for
transformers). The rendered conversation is cut at its control tokens and each text between two of them
is tokenized once, whole, so the ids are those that a user of the exported model gets; the mask comes
from character offsets. Control tokens come from the template alone: one that is spelled out inside a
message is tokenized as plain text.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.text.tokenizer import Tokenizer

# In Lemur's order; their ids follow the base vocabulary.
CHATML_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|diff_marker|>")

CHATML_TEMPLATE = r"""{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|im_end|>\n' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] | trim + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# What marks text as supervised. Few published templates have it; to talk with, they need it not.
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Tokens that end a turn: ChatML's, Llama-3's.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")

# A message: {"role": "user", "content": "..."}, and whatever else a template may read.
Message = Mapping[str, Any]

# Private-use characters; three that a conversation does not contain mark places in its rendered text.
_MARKS = range(0x100000, 0x10FFFE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a rendered conversation: one control token, or the text between two.

    Attributes:
      text: the token's name, or the text.
      control: whether it is a control token.
      supervised: one flag for each character of the text; one alone for a control token.
    """

    text: str
    control: bool
    supervised: Sequence[bool]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer, in generation and in exports: turn ends, eos, and those of `generation_config.json`.

    Turn ends count whether or not that file names them: chat tuning never supervises the end of the text.
    """
    ends = [tokenizer.control_tokens[name] for name in TURN_ENDS if name in tokenizer.control_tokens]
    return tuple(dict.fromkeys([*ends, tokenizer.eos_id, *tokenizer.generation_stop_ids]))


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False, name: str = ""
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its loss mask.

    No bos is put in front beyond what the template writes: the ids are those of
    `transformers`' `apply_chat_template`.

    Args:
      messages: the turns, in any order of roles.
      add_generation_prompt: end with the header of an assistant's turn, for the model to continue.
      name: what to call the conversation in errors.

    Returns:
      ids, and a mask of the same length: 1 where the token is a supervised target, that is where some
      of its characters are in text that the template marks as generated (as transformers has it, so a
      token that joins the last space of the prompt to the answer's first word is one). With ChatML:
      the assistant's content and its closing `<|im_end|>\\n`.

    Raises:
      UserError: malformed messages, or no supervised token although no generation prompt was asked.
    """
    if not add_generation_prompt and not _GENERATION.search(chat_template(tokenizer)):
        raise UserError(
            "the chat template has no {% generation %} ... {% endgeneration %} around what the assistant says, so"
            " nothing would be trained on: add them, or name another with config.tokenizer.chat_template"
        )
    ids: list[int] = []
    mask: list[int] = []
    pieces = render(tokenizer, messages, add_generation_prompt=add_generation_prompt, name=name)
    for position, piece in enumerate(pieces):
        if piece.control:
            ids.append(tokenizer.control_tokens[piece.text])
            mask.append(int(piece.supervised[0]))
        else:
            # Only text that opens the conversation gets the dummy space in front.
            text_ids, spans = tokenizer.encode_with_spans(piece.text, prefix=position == 0)
            ids += text_ids
            mask += [int(any(piece.supervised[begin:end])) for begin, end in spans]
    if not add_generation_prompt and not any(mask):
        raise UserError(
            f"conversation {name or '(unnamed)'} has no supervised token: its template marks nothing as"
            f" generated; the roles are {', '.join(message['role'] for message in messages)}"
        )
    return ids, mask


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False, name: str = ""
) -> list[Piece]:
    """A conversation as its template writes it, cut into control tokens and texts.

    Raises:
      UserError: malformed messages, or a template that refuses them.
    """
    _check_messages(messages, name)
    template = chat_template(tokenizer)
    spelled = json.dumps(messages, ensure_ascii=False, default=str) + template
    unused = (chr(code) for code in _MARKS if chr(code) not in spelled)
    begin, end, escape = itertools.islice(unused, 3)
    tokens = _alternatives(tuple(tokenizer.control_tokens))
    # A control token spelled out in a message is broken up, so that it is not taken for a real one.
    spelled_token = re.compile(f"(?={tokens})(.)", re.DOTALL)
    safe = _map_strings(messages, lambda text: spelled_token.sub(rf"\g<1>{escape}", text))
    try:
        text = _compile(template, begin, end).render(
            messages=safe, add_generation_prompt=add_generation_prompt, **_named_tokens(tokenizer)
        )
    except Exception as error:  # a template is a program of the user's: it can fail in any way
        raise UserError(f"conversation {name or '(unnamed)'}: its chat template says: {error}") from error
    return _cut(text, tokens, begin, end, escape)


def chat_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's template, or ChatML if it has none.

    Raises:
      UserError: it is ChatML and the tokenizer lacks ChatML's tokens.
    """
    template = tokenizer.chat_template
    if template is None:
        missing = [token for token in CHATML_TOKENS[1:3] if token not in tokenizer.control_tokens]
        if missing:
            raise UserError(
                f"the tokenizer has no chat template and no {' and '.join(missing)} for ChatML: make one that has"
                " with config.tokenizer.extend and config.tokenizer.add_tokens"
            )
        return CHATML_TEMPLATE
    return template


def _cut(text: str, tokens: str, begin: str, end: str, escape: str) -> list[Piece]:
    """Splits a rendered conversation at its control tokens and takes the marks out of it."""
    marks = re.compile(f"([{begin}{end}{escape}])")
    pieces: list[Piece] = []
    supervised = False
    for position, part in enumerate(re.split(f"({tokens})", text)):
        if position % 2:
            pieces.append(Piece(text=part, control=True, supervised=[supervised]))
            continue
        flags: list[bool] = []
        for run in marks.split(part):
            if run in (begin, end):
                supervised = run == begin
            elif run != escape:
                flags += [supervised] * len(run)
        if flags:
            pieces.append(Piece(text=marks.sub("", part), control=False, supervised=flags))
    return pieces


@functools.lru_cache(maxsize=16)
def _alternatives(tokens: tuple[str, ...]) -> str:
    # Longest first: one token may begin with another.
    return "(?:" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")"


@functools.lru_cache(maxsize=16)
def _compile(template: str, begin: str, end: str):
    """The Jinja template, with `begin` and `end` written around what it generates.

    The environment is the one in which transformers runs chat templates.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  (Jinja's own way of declaring a tag)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            before, after = (
                nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (begin, end)
            )
            return [before, *body, after]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda style: datetime.datetime.now().strftime(style)
    return environment.from_string(template)


def _raise(message: str) -> None:
    raise ValueError(message)


def _named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and its like, as templates expect them."""
    ids = {kind: getattr(tokenizer, f"{kind}_id") for kind in ("bos", "eos", "unk", "pad")}
    return {f"{kind}_token": tokenizer.token(index) for kind, index in ids.items() if index is not None}


def _check_messages(messages: Sequence[Message], name: str) -> None:
    where = f"conversation {name or '(unnamed)'}"
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"{where}: expected a list of messages, got {messages!r:.80}")
    for position, message in enumerate(messages):
        strings = isinstance(message, Mapping) and [message.get(key) for key in ("role", "content")]
        if not strings or not all(isinstance(value, str) for value in strings):
            raise UserError(
                f"{where}: message {position} is {message!s:.80}; expected a mapping with the strings"
                " 'role' and 'content'"
            )


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {function(key): _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, function) for item in value]
    return value
