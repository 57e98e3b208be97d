"""Tools and tool calls as text, for chat templates that do not support them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.common.errors import UserError

# A template that writes tools reads this variable; `builtin_tools` and the like are others.
_TOOLS = re.compile(r"\btools\b")

Tools = Sequence[Mapping[str, Any]]


def for_template(
    template: str, messages: Sequence[Mapping[str, Any]], tools: Tools
) -> tuple[list[Mapping[str, Any]], Tools]:
    """(messages, tools) for a chat template, with text in place of what it does not write.

    Args:
      template: Jinja.
      messages: turns, perhaps with OpenAI's `tool_calls`.
      tools: OpenAI's `tools`.

    Returns:
      Where the template has no `tool_calls`: the calls at the end of what the assistant says, each as JSON with `name`
      and `arguments` between <tool_call> and </tool_call>. Where it has no `tools`: the tools in front of what the
      first turn says, or in a system turn before an assistant's, and no tools.
    """
    turns = list(messages)
    if "tool_calls" not in template:
        turns = [_calls_as_text(turn) if turn.get("tool_calls") else turn for turn in turns]
    if tools and not _TOOLS.search(template):
        if turns[0]["role"] == "assistant":  # whose words are trained on
            turns.insert(0, {"role": "system", "content": _tools_prompt(tools)})
        else:
            turns[0] = {**turns[0], "content": f"{_tools_prompt(tools)}\n\n{turns[0]['content']}"}
        tools = ()
    return turns, tools


def check_calls(message: Mapping[str, Any]) -> None:
    """Raises UserError unless the message's `tool_calls`, if any, are a list of calls with names."""
    calls = message.get("tool_calls") or []
    if not (_are_objects(calls) and all(_is_named(call.get("function")) for call in calls)):
        raise UserError(f'tool_calls are {calls!s:.80}; expected [{{"function": {{"name", "arguments"}}}}]')


def check_tools(tools: Any) -> None:
    """Raises UserError unless `tools` are a list of OpenAI's tools, or of functions, with names."""
    if not (_are_objects(tools) and all(_is_named(tool.get("function", tool)) for tool in tools)):
        raise UserError(f"`tools` is not a list of tools with names: {tools!s:.80}")


def _are_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def _is_named(function: Any) -> bool:
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _calls_as_text(turn: Mapping[str, Any]) -> dict[str, Any]:
    calls = []
    for call in turn["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"].get("arguments") or {}
        function = {"name": name, "arguments": arguments}
        calls.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
    content = "\n".join([turn["content"]] * bool(turn["content"]) + calls)
    return {**turn, "content": content, "tool_calls": None}


def _tools_prompt(tools: Tools) -> str:
    return (
        f"You can use these tools:\n{json.dumps(list(tools), ensure_ascii=False)}\n"
        'Call one with <tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>; you see its result.'
    )
