"""Converts conversations of published data sets to one form: a list of {"role", "content"}.

Roles are system, user, assistant and tool; contents are strings; calls of tools are OpenAI's `tool_calls`. A turn of
the assistant with `weight: 0`, or `train`, `training` or `loss` false, gets `"train": False` and is not supervised.
Null fields count as absent. Each function takes a row and raises ValueError or UserError with a reason where it cannot
read it: `fields.Fields(messages=...)`. Turns may be spelled {"role", "content"} or {"from", "value"} everywhere.
A row's `system` or `system_prompt` becomes the first turn, unless it is there. Where a row has `tools` or `functions`
(a list, or JSON) or `chat_template_kwargs`, the result is {"messages": messages, "tools": tools, ...}. Preferences give
{"chosen": messages, "rejected": messages}, or one of them, for `Fields(preferences=...)`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.text.chat_template import THOUGHTS, is_trained
from lemur_jax.text.tool_calls import check_tools

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]
Conversation = Messages | dict[str, Any]

_ROLES = (
    dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("user", "human", "prompter"), "user")
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "function_call"), "assistant")
    | dict.fromkeys(("tool", "function", "observation", "function_response"), "tool")
)
_EXTRA_KEYS = {"assistant": THOUGHTS, "tool": ("tool_call_id",)}


def sharegpt(row: Row) -> Conversation:
    """ShareGPT: `conversations`, a list of {"from", "value"}; or `conversation`, as in data sets derived from it.

    Calls may be turns of `function_call`, with JSON of one or several, and results those of `observation`, as
    LLaMA-Factory has them.
    """
    turns = _list(row, "conversations" if row.get("conversation") is None else "conversation")
    return _conversation(row, [_turn(turn) for turn in turns])


def openorca(row: Row) -> Conversation:
    """OpenOrca: `system_prompt`, `question`, `response`."""
    question, answer = _get(row, "question"), _get(row, "response")
    return _conversation(row, [_message("user", question), _message("assistant", answer)])


def evol_code_alpaca(row: Row) -> Conversation:
    """Evol-CodeAlpaca and Alpaca's own form: `instruction`, perhaps `input`, `output`; LLaMA-Factory's `history`."""
    question = _get(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{row['input']}"
    pairs = [*(row.get("history") or ()), (question, _get(row, "output"))]
    turns = [turn for user, reply in pairs for turn in (_message("user", user), _message("assistant", reply))]
    return _conversation(row, turns)


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


def openai(row: Row) -> Conversation:
    """OpenAI `messages`: contents as strings or parts, tool calls and tool results; perhaps `tools`.

    Calls are trained on, results are not. `tools` and calls are written by the chat template, or as text where it has
    no place for them. `reasoning_content`, `thinking` or `reasoning` go to the chat template, which may write them.
    """
    return _conversation(row, [_turn(turn) for turn in _list(row, "messages")])


def openai_messages(turns: Sequence[Row]) -> Messages:
    """The turns of `openai` as a prompt: none is trained on, so an answer may be empty."""
    messages = [_turn({**turn, "weight": 0}) for turn in turns]
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def preference(row: Row) -> dict[str, Conversation]:
    """TRL's preferences, and UltraFeedback as binarized for it: `chosen` and `rejected`, perhaps `prompt` and `tools`.

    Each is a turn, a list of turns, or a text that answers `prompt`, which LLaMA-Factory calls `conversations` or
    `messages`. The turns that both share belong to the prompt: only what follows is trained on.
    """
    chosen, rejected = (_turns(row, key, "assistant") for key in ("chosen", "rejected"))
    fields = [name for name in ("prompt", "conversations", "messages") if row.get(name)]
    prompt = _turns(row, fields[0], "user") if fields and chosen[0]["role"] == "assistant" else []
    if prompt and prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with an answer, and `chosen` and `rejected` begin with others")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt += chosen[:shared]
    if not prompt and "assistant" in (chosen[0]["role"], rejected[0]["role"]):
        raise ValueError(
            "`chosen` and `rejected` answer nothing: the row needs `prompt`, or turns of the user before the answers"
            " (conversation_formats.anthropic_hh reads transcripts)"
        )
    completions = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    return {key: _answered(row, prompt, turns) for key, turns in completions.items()}


def anthropic_hh(row: Row) -> dict[str, Conversation]:
    """Anthropic's hh-rlhf: `chosen` and `rejected` are whole transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    return preference({key: _transcript(_get(row, key)) for key in ("chosen", "rejected")})


def _transcript(text: str) -> Messages:
    start, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", str(text))
    if start.strip() or not parts:
        raise ValueError(f"the transcript begins with {text!r:.40}, not with 'Human:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": role.lower(), "content": content.strip()} for role, content in turns]


def ultrafeedback(row: Row) -> dict[str, Conversation]:
    """UltraFeedback: `instruction` and `completions` with `response` and `overall_score`: the best and the worst."""
    prompt = _turns(row, "instruction", "user")
    ranked = sorted(_list(row, "completions"), key=_score)
    if len(ranked) < 2 or ranked[0]["overall_score"] == ranked[-1]["overall_score"]:
        raise ValueError("no two completions of different scores")
    worst, best = (_turns(each, "response", "assistant") for each in (ranked[0], ranked[-1]))
    return {"chosen": _answered(row, prompt, best), "rejected": _answered(row, prompt, worst)}


def _score(completion: Row) -> float:
    score = float(_get(completion, "overall_score"))
    if math.isnan(score):
        raise ValueError("an overall_score is NaN")
    return score


def labelled(row: Row) -> dict[str, Conversation]:
    """TRL's unpaired preferences, for KTO: a row as for `completion`, whose `label` says whether it is desirable.

    In place of prompt and completion the row may have `messages`, as LLaMA-Factory has it.
    """
    label = _get(row, "label")
    if label not in (0, 1):
        raise ValueError(f"the label is {label!r:.40}, neither true nor false")
    if not _has(row, "prompt") and _has(row, "messages"):
        *prompt, last = _list(row, "messages")
        row = {**row, "prompt": prompt, "completion": last}
    return {"chosen" if label else "rejected": completion(row)}


def completion(row: Row) -> Conversation:
    """TRL's `prompt` and `completion`, texts or turns: only the completion is trained on."""
    return _answered(row, _turns(row, "prompt", "user"), _turns(row, "completion", "assistant"))


def _turns(row: Row, name: str, role: str) -> Messages:
    """The turns of a field: a list of turns, one turn, or a text, which becomes a turn of `role`."""
    content = _get(row, name)
    if isinstance(content, str):
        return [_message(role, content)]
    if not (turns := [content] if isinstance(content, Mapping) else _list(row, name)):
        raise ValueError(f"field {name!r} has no turns")
    return [_turn(turn) for turn in turns]


def _answered(row: Row, prompt: Messages, completion: Messages) -> Conversation:
    untrained = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in prompt]
    return _conversation(row, [*untrained, *completion])


def _turn(turn: Row) -> dict[str, Any]:
    """A message of OpenAI's or ShareGPT's form."""
    keys = ("from", "value") if _has(turn, "from") else ("role", "content")
    role, content = _get(turn, keys[0]), turn.get(keys[1])
    calls = _values(turn.get("tool_calls") or [], "`tool_calls`")
    if turn.get("function_call"):  # the older spelling of one call
        calls = [*calls, turn["function_call"]]
    if role == "function_call":
        parsed = _values(content, "the calls of a turn of function_call")
        calls, content = parsed if isinstance(parsed, list) else [parsed], None
    text = "" if calls and content is None else _parts(_get(turn, keys[1]))
    message = _message(role, text, turn, [_call(call) for call in calls])
    extra = ("name", *_EXTRA_KEYS.get(message["role"], ()))
    return message | {key: turn[key] for key in extra if _has(turn, key)}


def _call(call: Row) -> dict[str, Any]:
    function = call["function"] if _has(call, "function") else call
    name = _get(function, "name")
    raw = function.get("arguments") or function.get("parameters") or {}
    arguments = _values(raw, f"the arguments of the call of {name!r}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of the call of {name!r} are {arguments!r:.40}, not an object")
    call_id = {"id": call["id"]} if _has(call, "id") else {}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _conversation(row: Row, messages: Messages) -> Conversation:
    """The messages with the system prompt and the tools of their row."""
    text = "".join(turn["content"] for turn in messages)
    for kind in ("image", "video", "audio"):
        if f"<{kind}>" in text and (row.get(kind) or row.get(f"{kind}s")):
            raise ValueError(f"the row has a field for its <{kind}>; only text can be trained on")
    if prompt := row.get("system") or row.get("system_prompt"):
        system = _message("system", prompt)
        there = [turn["content"].strip() for turn in messages if turn["role"] == "system"]
        messages = messages if prompt.strip() in there else [system, *messages]
    _checked(messages)
    tools = _values(row.get("tools") or row.get("functions") or [], "`tools`") or []
    check_tools(tools)
    options = _values(row.get("chat_template_kwargs") or {}, "`chat_template_kwargs`")
    # In Hermes' data the first turn describes them already.
    if messages[0]["role"] == "system" and "<tools>" in messages[0]["content"]:
        tools = ()
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    beside = {"tools": wrapped, "chat_template_kwargs": options}
    kept = {key: value for key, value in beside.items() if value}
    return {"messages": messages, **kept} if kept else messages


def _values(value: Any, label: str) -> Any:
    """Parsed JSON, or a value without the nulls with which Parquet fills the keys that an object lacks."""
    if not isinstance(value, str):
        return _without_nulls(value)
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{label} are not JSON") from error


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
    unsupported = [kind for kind in kinds if kind not in ("text", "input_text", "output_text")]
    if unsupported:
        raise ValueError(f"a message has a part of type {unsupported[0]!r}; only text is supported")
    return "".join(_get(part, "text") for part in content)


def _message(role: Any, content: Any, turn: Row | None = None, calls: Sequence[Row] = ()) -> dict[str, Any]:
    """A message; `turn`: where a flag says whether it is trained on."""
    if str(role) not in _ROLES:
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


def _list(row: Row, name: str) -> Sequence[Any]:
    value = _get(row, name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}, not a list")
    return value


def _has(mapping: Any, name: str) -> bool:
    return isinstance(mapping, Mapping) and mapping.get(name) is not None


def _get(mapping: Any, name: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{mapping!r:.40} stands where a field {name!r} is wanted")
    if mapping.get(name) is None:
        present = ", ".join(str(key) for key, value in mapping.items() if value is not None)
        raise ValueError(f"no field {name!r}; there are {present or 'none'}")
    return mapping[name]


def _checked(messages: Messages) -> Messages:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no turn of the assistant")
    if not any(message.get("train", True) for message in answers):
        raise ValueError("no turn of the assistant is trained on: all have weight 0 or train false")
    return messages
