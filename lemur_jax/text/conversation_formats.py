"""Converts conversations of published data sets to one form: a list of {"role", "content"}.

Roles are system, user, assistant and tool; contents are strings; calls of tools are OpenAI's `tool_calls`. A turn of
the assistant with `weight: 0`, or `train`, `training` or `loss` false, gets `"train": False` and is not supervised.
Null fields count as absent. Each function takes a row and raises ValueError with a reason where it cannot read it:
`fields.Fields(messages=...)`.
Where tools come with a conversation the result is {"messages": messages, "tools": tools}. Those of preferences give
{"chosen": messages, "rejected": messages}, or one of them, for `Fields(preferences=...)`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.text.chat_template import is_trained
from lemur_jax.text.tool_calls import check_tools

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "function": "tool",
}
_THOUGHT_KEYS = ("reasoning_content", "thinking")
_RESULT_KEYS = ("name", "tool_call_id")


def sharegpt(row: Row) -> Messages:
    """ShareGPT: `conversations`, a list of {"from", "value"}; with a `system` field if there is one.

    Turns spelled {"role", "content"} and a list named `conversation`, as in data sets derived from it, are read too.
    """
    turns = _list(row, "conversations" if row.get("conversation") is None else "conversation")
    messages = []
    for turn in turns:
        if _has(turn, "role") and not _has(turn, "from"):
            messages.append(_turn(turn))
        else:
            messages.append(_message(_get(turn, "from"), _get(turn, "value"), turn))
    return _checked([*_system(row.get("system")), *messages])


def openorca(row: Row) -> Messages:
    """OpenOrca: `system_prompt`, `question`, `response`."""
    system = _system(row.get("system_prompt"))
    question, answer = _get(row, "question"), _get(row, "response")
    return _checked([*system, _message("user", question), _message("assistant", answer)])


def evol_code_alpaca(row: Row) -> Messages:
    """Evol-CodeAlpaca and Alpaca's own form: `instruction`, perhaps `input`, `output`."""
    question = _get(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{row['input']}"
    return _checked([_message("user", question), _message("assistant", _get(row, "output"))])


def openassistant(row: Row) -> Messages:
    """OpenAssistant 1, a message tree a row (`*.trees.jsonl.gz`): the best-ranked path.

    At each turn the reply of the lowest rank (0 is best) that was not deleted; unranked ones come last. The path ends
    with its last assistant turn. To filter by language, name `prompt.lang` in `Fields.meta`, and `prompt/lang` in the
    step `metadata`.
    """
    messages: Messages = []
    node = row.get("prompt")
    if node is not None and node.get("deleted"):
        raise ValueError("the prompt was deleted")
    while node is not None:
        messages.append(_message(_get(node, "role"), _get(node, "text")))
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        node = min(replies, key=lambda one: (one.get("rank") is None, one.get("rank") or 0), default=None)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return _checked(messages)


def openassistant_messages(row: Row) -> Messages:
    """OpenAssistant 1, a message a row (its Parquet files, `*.messages.jsonl.gz`): the same path of a tree.

    For `Fields(gather="message_tree_id")`, which gives the rows of a tree together: each has `message_id`, `parent_id`
    (None at the root), `text`, `role`, and perhaps `rank` and `deleted`. To filter by language, name `lang` in
    `Fields.meta`.
    """
    nodes = {_get(message, "message_id"): {**message, "replies": []} for message in _list(row, "rows")}
    roots: list[Row] = []
    for name, node in nodes.items():
        parent = node.get("parent_id")
        if parent is not None and parent not in nodes:
            raise ValueError(f"message {name} answers {parent}, which is not beside it: a tree is in pieces")
        (roots if parent is None else nodes[parent]["replies"]).append(node)
    if len(roots) != 1:
        raise ValueError(f"a tree with {len(roots)} messages that answer none")
    return openassistant({"prompt": roots[0]})


def openai(row: Row) -> Messages | dict[str, Any]:
    """OpenAI `messages`: contents as strings or parts, tool calls and tool results; perhaps `tools`.

    Calls are trained on, results are not. `tools` (a list, or JSON as TRL has it) and calls are written by the chat
    template, or as text where it has no place for them. `reasoning_content` and `thinking` go to the chat template,
    which may write them.
    """
    return _with_tools(row, openai_messages(_list(row, "messages")))


def openai_messages(turns: Sequence[Row]) -> Messages:
    """The turns of `openai`."""
    return _checked([_turn(turn) for turn in turns])


def preference(row: Row) -> dict[str, Any]:
    """TRL's preferences, and UltraFeedback as binarized for it: `chosen` and `rejected`, perhaps `prompt` and `tools`.

    Each is a list of turns as of `openai`, or a text that answers `prompt`. The turns that both conversations share
    belong to the prompt: only what follows is trained on.
    """
    chosen, rejected = (_turns(_get(row, side), "assistant") for side in ("chosen", "rejected"))
    is_whole = chosen[0]["role"] != "assistant" or not _has(row, "prompt")
    prompt = [] if is_whole else _turns(row["prompt"], "user")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt += chosen[:shared]
    if not prompt and "assistant" in (chosen[0]["role"], rejected[0]["role"]):
        raise ValueError(
            "`chosen` and `rejected` answer nothing: the row needs `prompt`, or turns of the user before the answers"
            " (conversation_formats.anthropic_hh reads transcripts)"
        )
    sides = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    return {side: _with_tools(row, _answered(prompt, turns)) for side, turns in sides.items()}


def anthropic_hh(row: Row) -> dict[str, Any]:
    """Anthropic's hh-rlhf: `chosen` and `rejected` are whole transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    return preference({side: _transcript(_get(row, side)) for side in ("chosen", "rejected")})


def _transcript(text: str) -> Messages:
    start, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if start.strip() or not parts:
        raise ValueError(f"the transcript begins with {text!r:.40}, not with 'Human:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": role.lower(), "content": said.strip()} for role, said in turns]


def ultrafeedback(row: Row) -> dict[str, Messages]:
    """UltraFeedback: `instruction` and `completions` with `response` and `overall_score`: the best and the worst."""
    prompt = _turns(_get(row, "instruction"), "user")
    ranked = sorted(_list(row, "completions"), key=_score)
    if len(ranked) < 2 or ranked[0]["overall_score"] == ranked[-1]["overall_score"]:
        raise ValueError("no two completions of different scores")
    worst, best = (_turns(_get(each, "response"), "assistant") for each in (ranked[0], ranked[-1]))
    return {"chosen": _answered(prompt, best), "rejected": _answered(prompt, worst)}


def _score(completion: Row) -> float:
    score = float(_get(completion, "overall_score"))
    if math.isnan(score):
        raise ValueError("an overall_score is NaN")
    return score


def labelled(row: Row) -> dict[str, Any]:
    """TRL's unpaired preferences, for KTO: `prompt`, `completion`, and a `label` that says whether it is desirable."""
    prompt, completion = _turns(_get(row, "prompt"), "user"), _turns(_get(row, "completion"), "assistant")
    label = _get(row, "label")
    if label not in (0, 1):
        raise ValueError(f"the label is {label!r:.40}, neither true nor false")
    return {"chosen" if label else "rejected": _with_tools(row, _answered(prompt, completion))}


def _turns(content: Any, role: str) -> Messages:
    """A list of turns, or a text as one of `role`."""
    if isinstance(content, str):
        return [_message(role, content)]
    return [_turn(turn) for turn in content]


def _answered(prompt: Messages, completion: Messages) -> Messages:
    untrained = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in prompt]
    return _checked([*untrained, *completion])


def _turn(turn: Row) -> dict[str, Any]:
    """A message of OpenAI's form."""
    role = _get(turn, "role")
    calls = [_call(call) for call in turn.get("tool_calls") or []]
    if turn.get("function_call"):  # the older spelling of one call
        calls.append(_call({"function": turn["function_call"]}))
    content = "" if calls and not _has(turn, "content") else _parts(_get(turn, "content"))
    message = _message(role, content, turn, calls)
    kept = (
        _THOUGHT_KEYS if message["role"] == "assistant" else _RESULT_KEYS if message["role"] == "tool" else ()
    )
    return message | {key: turn[key] for key in kept if _has(turn, key)}


def _call(call: Row) -> dict[str, Any]:
    function = _get(call, "function")
    name = _get(function, "name")
    arguments = _values(function.get("arguments") or {}, f"the arguments of the call of {name!r}")
    named = {"id": call["id"]} if _has(call, "id") else {}
    return {**named, "type": "function", "function": {"name": name, "arguments": arguments}}


def _with_tools(row: Row, messages: Messages) -> Messages | dict[str, Any]:
    tools = _values(row.get("tools") or [], "`tools`") or []
    check_tools(tools)
    return {"messages": messages, "tools": tools} if tools else messages


def _values(value: Any, what: str) -> Any:
    """JSON, or a value without the nulls by which Parquet gives each object the keys of all."""
    if not isinstance(value, str):
        return _without_nulls(value)
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{what} are not JSON") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parts(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"a content is {type(content).__name__}, neither a string nor a list of parts")
    kinds = [_get(part, "type") for part in content]
    odd = [kind for kind in kinds if kind not in ("text", "input_text", "output_text")]
    if odd:
        raise ValueError(f"a message has a part of type {odd[0]!r}; only text can be trained on")
    return "".join(_get(part, "text") for part in content)


def _message(role: Any, content: Any, turn: Row | None = None, calls: Sequence[Row] = ()) -> dict[str, Any]:
    """A message; `turn`: where a flag says whether it is trained on."""
    if role not in _ROLES:
        raise ValueError(f"unknown role {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"the content of a turn of {role} is {type(content).__name__}, not a string")
    message: dict[str, Any] = {"role": _ROLES[role], "content": content}
    if message["role"] == "assistant":
        if calls:
            message["tool_calls"] = calls
        if turn is not None and not is_trained(turn):
            message["train"] = False
        elif not content.strip() and not calls:
            raise ValueError(f"a turn of {role} is empty")
    return message


def _system(text: Any) -> Messages:
    return [_message("system", text)] if text else []


def _list(row: Row, name: str) -> Sequence[Any]:
    value = row.get(name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"no list `{name}`")
    return value


def _has(mapping: Any, name: str) -> bool:
    return isinstance(mapping, Mapping) and mapping.get(name) is not None


def _get(mapping: Any, name: str) -> Any:
    if not _has(mapping, name):
        raise ValueError(f"no field {name!r}")
    return mapping[name]


def _checked(messages: Messages) -> Messages:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no turn of the assistant")
    if not any(message.get("train", True) for message in answers):
        raise ValueError("no turn of the assistant is trained on: all have weight 0 or train false")
    return messages
