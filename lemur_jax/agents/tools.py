"""Tool calls, and a scripted user who says more only when asked, or when the answer is wrong.

Calls are written as in `text/tool_calls.py`: JSON with `name` and `arguments` between <tool_call> and </tool_call>,
OpenAI's `tool_calls` as text; results come back in turns of the role `tool`.
"""

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lemur_jax.agents.environments import SHOWN, Environment, Step
from lemur_jax.agents.problems import LIMITS
from lemur_jax.agents.sandbox import run_python

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)

Shop = dict[str, dict[str, Any]]

# Orders by number; every episode has its own copy.
SHOP: Shop = {
    "1001": {"customer": "Ada", "item": "kettle", "price": 31, "status": "in transit, last seen in Leeds"},
    "1002": {"customer": "Alan", "item": "chess set", "price": 40, "status": "delivered"},
    "1003": {"customer": "Alan", "item": "notebook", "price": 18, "status": "delivered"},
    "1004": {"customer": "Grace", "item": "lamp", "price": 55, "status": "being packed"},
    "1005": {"customer": "Grace", "item": "clock", "price": 25, "status": "being packed"},
}


def find_orders(shop: Shop, customer: str) -> list[str]:
    """Numbers of a customer's orders."""
    return [number for number, order in shop.items() if order["customer"].lower() == customer.lower()]


def get_order(shop: Shop, number: str) -> dict[str, Any]:
    """Customer, item, price and status of an order."""
    return shop[number]


def cancel_order(shop: Shop, number: str) -> str:
    """Cancels an order."""
    shop[number]["status"] = "cancelled"
    return f"order {number} is cancelled"


def set_address(shop: Shop, number: str, address: str) -> str:
    """Sends an order to another address."""
    shop[number]["address"] = address
    return f"order {number} goes to {address}"


def python(shop: Shop, code: str) -> str:
    """What a Python program prints."""
    result = run_python(code, limits=LIMITS)
    return (result.output + result.errors)[-SHOWN:] or "(no output)"


TOOLS: dict[str, Callable[..., Any]] = {
    tool.__name__: tool for tool in (find_orders, get_order, cancel_order, set_address, python)
}


def schemas() -> list[dict[str, Any]]:
    """The tools as OpenAI's `tools` describes them; all arguments are strings."""
    tools = []
    for name, tool in TOOLS.items():
        names = list(inspect.signature(tool).parameters)[1:]
        properties = {argument: {"type": "string"} for argument in names}
        parameters = {"type": "object", "properties": properties, "required": names}
        function = {"name": name, "description": inspect.getdoc(tool), "parameters": parameters}
        tools.append({"type": "function", "function": function})
    return tools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errand:
    """What the user wants, and the script of what they say.

    Attributes:
      request: the first message, perhaps incomplete.
      hints: replies to wrong answers, in turn; the last one repeats.
      solved: (shop, answer) -> whether the user accepts.
      answers: word in a question -> reply.
    """

    request: str
    hints: Sequence[str]
    solved: Callable[[Shop, str], bool]
    answers: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _changed(shop: Shop, key: str) -> dict[str, Any]:
    """New values of a field by order."""
    return {number: order[key] for number, order in shop.items() if order.get(key) != SHOP[number].get(key)}


ERRANDS = {
    "status": Errand(
        request="I am Ada. Where is my parcel?",
        hints=("Look my order up.",),
        solved=lambda shop, answer: "leeds" in answer.lower(),
    ),
    "total": Errand(
        request="I am Alan. What have my orders cost together?",
        hints=("There are two of them.", "Add their prices up."),
        solved=lambda shop, answer: re.search(r"\b58\b", answer) is not None,
    ),
    "cancel": Errand(
        request="Please cancel my lamp.",
        answers={"name": "I am Grace.", "who": "I am Grace.", "number": "I have no number, I am Grace."},
        hints=("It is still not cancelled. I am Grace.", "Only the lamp is to be cancelled."),
        solved=lambda shop, answer: _changed(shop, "status") == {"1004": "cancelled"},
    ),
    "address": Errand(
        request="I am Grace. Send my clock somewhere else.",
        answers={"where": "To 4 Hill Road.", "address": "To 4 Hill Road.", "which": "The clock."},
        hints=("I have moved to 4 Hill Road.",),
        solved=lambda shop, answer: _changed(shop, "address") == {"1005": "4 Hill Road"},
    ),
    "compute": Errand(
        request="What is the 30th Fibonacci number, if the first two are 1?",
        hints=("No. Write a program for it.",),
        solved=lambda shop, answer: "832040" in answer.replace(",", ""),
    ),
}


class ToolEnvironment(Environment):
    """An errand in the shop, solved when the user accepts what was done and said."""

    def __init__(self, id: str, errand: Errand):
        self.id = id
        self._errand = errand
        self._shop: Shop = {}
        self._wrong = 0

    def reset(self) -> str:
        self._shop, self._wrong = copy.deepcopy(SHOP), 0
        return (
            "You serve the customers of a shop with these tools:\n"
            f"{json.dumps(schemas())}\n"
            'Call one with <tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call> and nothing else; you see'
            " its result. Ask the customer if something is missing. When all is done, tell them.\n\n"
            f"{self._errand.request}"
        )

    def step(self, action: str) -> Step:
        if calls := _CALL.findall(action):
            results = [self._call(text) for text in calls]
            verdict = next((verdict for _, verdict in results if verdict != "unfinished"), "unfinished")
            output = "\n".join(result for result, _ in results)
            return Step(observation=output, verdict=verdict, role="tool")
        if not action.strip():
            return Step(observation="Are you there?", verdict="no answer")
        if self._errand.solved(self._shop, action):
            return Step(observation="Thank you.", reward=1.0, verdict="passed")
        if "?" in action:
            question = action.lower()
            answers = [answer for word, answer in self._errand.answers.items() if word in question]
            return Step(observation=answers[0] if answers else "I do not know.", verdict="asked")
        hint = self._errand.hints[min(self._wrong, len(self._errand.hints) - 1)]
        self._wrong += 1
        return Step(observation=hint, verdict="wrong answer")

    def _call(self, text: str) -> tuple[str, str]:
        """(result, verdict) of a call."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return 'Error: a call is JSON, {"name": "...", "arguments": {...}}', "syntax"
        if not isinstance(name, str) or name not in TOOLS:
            return f"Error: there is no tool {name!r}", "name"
        try:
            result = TOOLS[name](self._shop, **{key: str(value) for key, value in dict(arguments).items()})
        except (TypeError, ValueError) as error:
            return f"Error: {error}", "type"
        except KeyError as error:
            return f"Error: there is no order {error}", "name"
        return json.dumps(result, ensure_ascii=False), "unfinished"


def tool_environments() -> list[ToolEnvironment]:
    return [ToolEnvironment(f"tools/{name}", errand) for name, errand in ERRANDS.items()]
