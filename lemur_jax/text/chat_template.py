"""Conversations to token ids with a loss mask, through the tokenizer's Jinja chat template.

Ids and mask are those of transformers' `apply_chat_template`: the template marks what is supervised with
`{% generation %} ... {% endgeneration %}`, and character offsets carry that over to tokens. In a template without marks
an assistant's turn is what it adds to the conversation before it, rendered with the generation prompt. A control token
that a message spells is plain text. A turn with `weight: 0` or one of `TRAIN_FLAGS` false is not supervised. Tools and
calls are text where a template has no place for them (`tool_calls.py`). A template that leaves out a content, a call or
a tool is refused.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.text import tool_calls
from lemur_jax.text.files import CHATML_TEMPLATE, CHATML_TOKENS
from lemur_jax.text.tokenizer import TURN_ENDS, Tokenizer

# What marks text as supervised; few published templates have it.
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

# A message: {"role": "user", "content": "..."}, and whatever else a template may read.
Message = Mapping[str, Any]

# Private-use characters; those that a conversation does not contain mark positions in its rendered text.
_MARKS = range(0xF0000, 0xFFFFE)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer, in generation and in exports: turn ends, eos, and those of `generation_config.json`."""
    turn_ends = [tokenizer.control_tokens[name] for name in TURN_ENDS if name in tokenizer.control_tokens]
    return tuple(dict.fromkeys([*turn_ends, tokenizer.eos_id, *tokenizer.generation_stop_ids]))


# Keys of what the assistant thinks before it answers.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Keys of a turn that say whether it is trained on: `weight` of OpenAI and Mistral, `train` and `training` of axolotl,
# `loss` of ms-swift.
TRAIN_FLAGS = ("weight", "train", "training", "loss")


def is_trained(message: Message) -> bool:
    """Whether a turn may be supervised: not if one of its `TRAIN_FLAGS` is 0 or false.

    Raises UserError: a weight other than 0 and 1, a flag that is neither true nor false, or marks of parts of a
    turn.
    """
    if message.get("train_detail"):
        raise UserError("a turn has train_detail, marks of its parts: only whole turns can be left out")
    flags = {key: message[key] for key in TRAIN_FLAGS if message.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"a turn has {key} {value!r:.40}: only 0 and 1, false and true, are supported")
    return all(flags.values())


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: tool_calls.Tools = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its loss mask.

    Args:
      messages: the turns, in any order of roles; an assistant's may have OpenAI's `tool_calls`.
      tools: OpenAI's `tools`, which the assistant may call.
      chat_template_kwargs: other variables that the template reads, e.g. {"enable_thinking": False}.
      add_generation_prompt: end with the header of an assistant's turn, for the model to continue.

    Returns:
      ids, and a mask of the same length: 1 where a token overlaps text that is supervised. With ChatML: the
      assistant's content and its closing `<|im_end|>\\n`.

    Raises:
      UserError: malformed messages, or a template that leaves out a content, a call, a tool or a variable with text;
        without a generation prompt, no supervised token, or a template without marks that does not write a turn as it
        would be generated.
    """
    try:
        text, spans = _render(tokenizer, messages, tools, add_generation_prompt, chat_template_kwargs or {})
    except RecursionError as error:
        raise UserError(
            f"a call, a tool or a variable of the conversation is nested too deeply: {error}"
        ) from error
    ids, offsets = tokenizer.encode_marked(text)
    mask = _overlaps(offsets, spans)
    if not add_generation_prompt and not any(mask):
        raise UserError(
            "the conversation has no supervised token: the chat template marks nothing as generated, or all turns of"
            f" the assistant have weight 0; the roles are {', '.join(message['role'] for message in messages)}"
        )
    return ids, mask


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """A conversation as its template writes it, control tokens spelled out; UserError if it is malformed or refused."""
    return tokenizer.unmark(_render(tokenizer, messages, (), add_generation_prompt, {}, as_given=False)[0])


def chat_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's template, or ChatML if it has none; UserError if it then lacks ChatML's tokens."""
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


def check_template(tokenizer: Tokenizer) -> None:
    """Raises UserError if no conversation of two plain questions and answers can be trained on with the template."""
    encode_chat(tokenizer, [{"role": role, "content": role} for role in ("user", "assistant") * 2])


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: tool_calls.Tools,
    add_generation_prompt: bool,
    options: Mapping[str, Any],
    as_given: bool = True,
) -> tuple[str, list[tuple[int, int]]]:
    """The text for `Tokenizer.encode_marked`, and the characters [begin, end) of it that are supervised.

    Args:
      as_given: where the template has no marks, compose the text with `_with_marked_answers`, for training; if false,
        return what the template writes.
    """
    _check_messages(messages, tools)
    template = chat_template(tokenizer)
    if not isinstance(options, Mapping):
        raise UserError(f"chat_template_kwargs is {options!r:.40}, not an object")
    for name, value in options.items():
        if name in ("messages", "tools", "add_generation_prompt"):
            raise UserError(f"chat_template_kwargs has {name!r}, which is given beside them")
        # In training data a switch such as `enable_thinking` may be for other templates.
        required = value not in (None, "", [], {}) and (
            add_generation_prompt or isinstance(value, str | list)
        )
        if required and not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(f"the chat template leaves out {name!r} of chat_template_kwargs, {value!r:.40}")
    turns, tools = tool_calls.for_template(template, messages, tools)
    all_text = json.dumps([turns, tools, options], ensure_ascii=False, default=str) + template
    unused = (chr(code) for code in _MARKS if chr(code) not in all_text)
    begin, end, separator, untrained, locator = itertools.islice(unused, 5)
    # So that a control token spelled in a message is not taken for one of the template's.
    broken = functools.partial(tokenizer.break_control_tokens, separator=separator)
    turns, tools, options = _map_strings([turns, tools, options], broken)
    turns = [_with_thoughts(turn) for turn in turns]
    marked_turns = [turn if is_trained(turn) else _mark_turn(turn, lambda _: untrained) for turn in turns]
    values = {"documents": None, **tokenizer.special_names, **options}

    def write(turns: Sequence[Message], prompt: bool = False, *, tools: tool_calls.Tools) -> str:
        program = _compile(template, begin, end)
        return program.render(messages=turns, add_generation_prompt=prompt, tools=tools or None, **values)

    def compose(turns: Sequence[Message], tools: tool_calls.Tools) -> str:
        with_tools = functools.partial(write, tools=tools)
        if not as_given or add_generation_prompt or _GENERATION.search(template):
            return with_tools(turns, add_generation_prompt)
        return _with_marked_answers(turns, with_tools, (begin, end, locator), tokenizer)

    try:
        text = compose(marked_turns, tools)
        _check_complete(compose, turns, tools, unused)
    except UserError:
        raise
    except Exception as error:  # a template is a program of the user's: it can fail in any way
        raise UserError(f"the chat template says: {error}") from error
    return _remove_marks(tokenizer.mark_control_tokens(text), begin, end, separator, untrained)


def _with_thoughts(turn: Message) -> Message:
    """The turn without nulls, and with its thoughts under each name that a template may read, as in transformers."""
    kept = {key: value for key, value in turn.items() if value is not None}
    thoughts = [kept[name] for name in THOUGHTS if name in kept]
    return {"thinking": thoughts[0], **kept, "reasoning_content": thoughts[0]} if thoughts else kept


def _mark_turn(turn: Message, mark: Callable[[str], str]) -> Message:
    """The turn with a mark at the end of its content and of the name of each call; `mark` gets what it marks."""
    calls = [
        {**call, "function": _mark_name(call["function"], mark("a call"))}
        for call in turn.get("tool_calls", ())
    ]
    marked = {**turn, "tool_calls": calls} if calls else dict(turn)
    # Before its trailing space, which templates trim. A template may ask whether there is a content beside calls.
    if (text := turn["content"].rstrip()) or not calls:
        marked["content"] = text + mark("the content") + turn["content"][len(text) :]
    return marked


def _mark_name(function: Mapping[str, Any], mark: str) -> dict[str, Any]:
    return {**function, "name": f"{function['name']}{mark}"}


def _check_complete(
    compose: Callable[..., str], turns: Sequence[Message], tools: tool_calls.Tools, marks: Iterator[str]
) -> None:
    """Raises UserError if the text of a conversation lacks a content, a name, a call or a tool.

    The text is composed once more for that: a mark in a content could change what a template does with it.
    """
    expected: dict[str, str] = {}

    def mark(what: str) -> str:
        expected[character := next(marks)] = what
        return character

    marked = []
    for index, turn in enumerate(turns):
        where = f"of turn {index} ({turn['role']})"
        says = turn["content"].strip() or turn.get("tool_calls")
        if turn.get("name") and turn["role"] != "tool":
            turn = _mark_name(turn, mark(f"the name {where}"))
        marked.append(_mark_turn(turn, lambda what, where=where: mark(f"{what} {where}")) if says else turn)
    marked_tools = []
    for tool in tools:
        function = _mark_name(tool.get("function", tool), mark("a tool"))
        marked_tools.append({**tool, "function": function} if "function" in tool else function)
    text = compose(marked, marked_tools)
    lost = [what for character, what in expected.items() if character not in text]
    if lost:
        raise UserError(
            f"the chat template leaves out {lost[0]}: change the conversations, or name a template that writes it with"
            " config.tokenizer.chat_template"
        )


def _with_marked_answers(
    turns: Sequence[Message], write: Callable[..., str], marks: tuple[str, str, str], tokenizer: Tokenizer
) -> str:
    """The text of a conversation, marks around what each trained turn of the assistant adds to the turns before it.

    If a template rewrites an answer once other turns follow, as Qwen3's removes its thinking, the answer stays as it
    was given.

    Args:
      write: (turns, whether to end with a generation prompt) -> text.
      marks: for the begin and the end of an answer, and one that locates the end of a turn's content.
    """
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant" and is_trained(turn)]
    if not answers:
        return write(turns)
    try:
        prefix = write(turns[: answers[0]], True)
    except Exception as error:
        if answers[0]:
            raise
        raise UserError(
            "the chat template cannot write the generation prompt of turn 0, as no turn is before it: leave out this"
            f' turn of the assistant, or give it "weight": 0 ({error})'
        ) from error
    parts = [prefix]
    for turn, following in zip(answers, [*answers[1:], None], strict=True):
        answered = longer = write(turns[: turn + 1])
        if turn + 1 < len(turns):
            longer = write(turns[:following], following is not None)
        end, rest = answered, longer
        if not longer.startswith(answered):
            # The template changes the answer, or what is before it. It has to end equally at least.
            placed = [*turns[:turn], _mark_turn(turns[turn], lambda _: marks[2])]
            changed = write([*placed, *turns[turn + 1 : following]], following is not None)
            end, rest = (text.rpartition(marks[2])[2] for text in (write(placed), changed))
        if not rest.startswith(end):
            answered, end = _without_last_eos(answered, tokenizer), _without_last_eos(end, tokenizer)
        if not (answered.startswith(prefix) and rest.startswith(end)):
            raise UserError(
                f"the chat template does not write turn {turn} as it would be generated: it is not what follows the"
                " generation prompt, or ends differently when others follow; put"
                " {% generation %} ... {% endgeneration %} around what the assistant says in a copy, and name that"
                " with config.tokenizer.chat_template"
            )
        parts += [marks[0], answered[len(prefix) :], marks[1], rest[len(end) :]]
        prefix = longer
    return "".join(parts)


def _without_last_eos(text: str, tokenizer: Tokenizer) -> str:
    """Phi-3's template ends a conversation with eos, after the token that ends each of its turns."""
    body = text.removesuffix(tokenizer.token(tokenizer.eos_id))
    return body if body.rstrip().endswith(tuple(tokenizer.control_tokens)) else text


def _remove_marks(
    text: str, begin: str, end: str, separator: str, untrained: str
) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the spans between `begin` and `end` that do not contain `untrained`."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    trained = True
    for part in re.split(f"([{begin}{end}{separator}{untrained}])", text):
        if part == begin:
            start, trained = length, True
        elif part == untrained:
            trained = False
        elif part == end and trained:
            spans.append((start, length))
        elif part not in (end, separator):
            parts.append(part)
            length += len(part)
    return "".join(parts), spans


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that overlaps one of the spans; both are in order."""
    mask, i = [], 0
    for begin, end in offsets:
        while i < len(spans) and begin >= spans[i][1]:
            i += 1
        mask.append(int(i < len(spans) and end > spans[i][0]))
    return mask


@functools.lru_cache(maxsize=16)
def _compile(template: str, begin: str, end: str):
    """The Jinja template in transformers' environment, with `begin` and `end` around what it generates."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  (Jinja's own way of declaring a tag)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller):
            return f"{begin}{caller()}{end}"

    class Environment(ImmutableSandboxedEnvironment):
        """Jinja's sandbox; without the cache its check takes half of the time of a template."""

        def is_safe_attribute(self, obj, attr, value):
            key = type(obj), attr  # on which alone Jinja's answer depends
            if key not in is_safe:
                is_safe[key] = super().is_safe_attribute(obj, attr, value)
            return is_safe[key]

    is_safe: dict[tuple[type, str], bool] = {}
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda style: datetime.datetime.now().strftime(style)
    return environment.from_string(template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter `tojson`, with the arguments that transformers gives it, which templates may pass by position."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise ValueError(message)


def _check_messages(messages: Sequence[Message], tools: tool_calls.Tools) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"expected a list of messages, got {messages!r:.80}")
    for position, message in enumerate(messages):
        strings = isinstance(message, Mapping) and [message.get(key) for key in ("role", "content")]
        if not strings or not all(isinstance(value, str) for value in strings):
            raise UserError(
                f"message {position} is {message!s:.80}; expected a mapping with the strings 'role' and 'content'"
            )
        is_trained(message)
        tool_calls.check_calls(message)
    tool_calls.check_tools(tools)


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {function(key): _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, function) for item in value]
    return value
