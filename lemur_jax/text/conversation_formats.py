"""Conversations as published data sets ship them, to one form: a list of {"role", "content"}.

Roles are system, user, assistant and tool; contents are strings. Each function takes a row and raises
ValueError with a reason for one that it cannot read. Use them as `fields.Fields(messages=...)`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Messages = list[dict[str, str]]

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


def sharegpt(row: Row) -> Messages:
    """ShareGPT: `conversations`, a list of {"from", "value"}; with a `system` field if there is one.

    Turns that are spelled {"role", "content"}, as some of its descendants do, are taken too.
    """
    turns = _list(row, "conversation" if "conversation" in row else "conversations")
    messages = [
        _message(turn["role"], _get(turn, "content"))
        if isinstance(turn, Mapping) and "from" not in turn and "role" in turn
        else _message(_get(turn, "from"), _get(turn, "value"))
        for turn in turns
    ]
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

    At each turn the reply of the lowest rank (0 is best) that was not deleted; unranked ones come after
    ranked ones, in their order. The path ends with its last assistant turn. The language is in the
    row: name `prompt.lang` in `Fields.meta` and filter on it.
    """
    messages: Messages = []
    node = row.get("prompt")
    if node is not None and node.get("deleted"):
        raise ValueError("the prompt was deleted")
    while node is not None:
        messages.append(_message(_get(node, "role"), _get(node, "text")))
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        node = min(replies, key=_rank, default=None)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return _checked(messages)


def openassistant_messages(row: Row) -> Messages:
    """OpenAssistant 1, a message a row (its Parquet files, `*.messages.jsonl.gz`): the same path of a tree.

    For `Fields(gather="message_tree_id")`, which gives the rows of a tree together: each has
    `message_id`, `parent_id` (None at the root), `text`, `role`, and perhaps `rank` and `deleted`. The
    language is that of the root: name `lang` in `Fields.meta`.
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


def openai(row: Row) -> Messages:
    """OpenAI `messages`: contents as strings or parts, tool calls and tool results.

    ChatML as Lemur trained it has no words for tools. A call becomes part of what the assistant says, as
    JSON between <tool_call> and </tool_call>, and so is trained on; a result is a turn of the role tool.
    """
    messages = []
    for turn in _list(row, "messages"):
        role = _get(turn, "role")
        content = _parts(turn.get("content"))
        calls = [_call(_get(call, "function")) for call in turn.get("tool_calls") or []]
        if turn.get("function_call"):  # before tools were called so
            calls.append(_call(turn["function_call"]))
        messages.append(_message(role, "\n".join([content] * bool(content) + calls)))
    return _checked(messages)


def _rank(reply: Row) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else rank


def _call(function: Any) -> str:
    name, arguments = _get(function, "name"), function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"the arguments of the call of {name!r} are not JSON") from error
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _parts(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ValueError(f"a content is {type(content).__name__}, neither a string nor a list of parts")
    kinds = [_get(part, "type") for part in content]
    odd = [kind for kind in kinds if kind not in ("text", "input_text", "output_text")]
    if odd:
        raise ValueError(f"a message has a part of type {odd[0]!r}; only text can be trained on")
    return "".join(_get(part, "text") for part in content)


def _message(role: Any, content: Any) -> dict[str, str]:
    if role not in _ROLES:
        raise ValueError(f"unknown role {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"the content of a turn of {role} is {type(content).__name__}, not a string")
    return {"role": _ROLES[role], "content": content}


def _system(text: Any) -> Messages:
    return [_message("system", text)] if text else []


def _list(row: Row, name: str) -> Sequence[Any]:
    value = row.get(name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"no list `{name}`")
    return value


def _get(mapping: Any, name: str) -> Any:
    if not isinstance(mapping, Mapping) or name not in mapping:
        raise ValueError(f"no field {name!r}")
    return mapping[name]


def _checked(messages: Messages) -> Messages:
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn of the assistant")
    return messages
