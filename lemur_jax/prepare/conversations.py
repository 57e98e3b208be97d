"""Conversations made of real material: documented functions, module docstrings, reference chapters.

Each conversation speaks about one module or one chapter. Everything that varies (phrasing, number of
turns, system message) is chosen by a hash of what it is about, so that a corpus is always the same.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lemur_jax.prepare.stdlib import Definition, Module, topic_sections

Choice = TypeVar("Choice")

SHORTEST_ANSWER = 40  # characters
LONGEST_ANSWER = 900
LONGEST_TASK = 400
LONGEST_CONVERSATION = 1500  # with this, nine of ten stay below 512 tokens of a 4,000-piece BPE

SYSTEM = (
    "You are Lemur, an assistant who knows natural language and code.",
    "You are a helpful assistant for Python programmers.",
    "Answer questions about Python's standard library, briefly and exactly.",
    "You are an experienced Python developer. Give working code when code is asked for.",
)
ASK_MODULE = (
    "What is the Python module `{name}` for?",
    "Describe the module `{name}` of Python's standard library.",
    "What does the `{name}` module provide?",
    "I came across `{name}` in Python. What is it?",
)
ASK_EXPLANATION = (
    "What does `{name}{signature}` in Python's `{module}` module do?",
    "Explain `{module}.{name}{signature}`.",
    "How is `{name}{signature}` from the module `{module}` meant to be used?",
    "I am reading the module `{module}`. What is `{name}{signature}`?",
)
ASK_EXPLANATION_NEXT = (
    "And what about `{name}{signature}`?",
    "What does `{name}{signature}` do?",
    "Please explain `{name}{signature}` as well.",
)
ASK_CODE = (
    "Write a Python {kind} `{name}{signature}`: {task}",
    "Implement this Python {kind}.\n\n`{name}{signature}`\n\n{task}",
    "I need a {kind} `{name}{signature}` in Python. {task}",
    "Complete the {kind} `{name}{signature}` with this docstring:\n\n{task}",
)
ASK_CODE_NEXT = (
    "Show me the code of `{name}`.",
    "How is `{name}` implemented?",
    "Can you write `{name}` out?",
)
ASK_DOCUMENTATION = (
    "What does Python's documentation say about {title}?",
    "Explain this topic of the Python language reference: {title}.",
    "I want to understand {title} in Python. What does the reference say?",
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer; `next_question` asks the same where the subject is already known."""

    question: str
    next_question: str
    answer: str

    @property
    def length(self) -> int:
        return len(self.question) + len(self.answer)


def about_module(module: Module, seen: set[str]) -> Iterator[list[dict[str, str]]]:
    """Conversations about a module: what it is, what its parts do, how they are written.

    Args:
      module: the module.
      seen: answers already given anywhere; none is given again. Updated.
    """
    turns = []
    for turn in _module_turns(module):
        if SHORTEST_ANSWER <= len(turn.answer) <= LONGEST_ANSWER and turn.answer not in seen:
            seen.add(turn.answer)
            turns.append(turn)
    start = 0
    while start < len(turns):
        key = f"{module.path} {turns[start].question}"
        count = 1 + _choose((0, 0, 0, 1, 1, 2), "turns " + key)
        chosen = turns[start : start + 1]
        for turn in turns[start + 1 : start + count]:
            if sum(other.length for other in [*chosen, turn]) > LONGEST_CONVERSATION:
                break
            chosen.append(turn)
        start += len(chosen)
        yield _messages(chosen, key)


def about_topic(name: str, text: str, seen: set[str]) -> Iterator[list[dict[str, str]]]:
    """Conversations about a chapter of the language reference, one for each of its sections."""
    for title, body in topic_sections(text):
        answer = first_paragraphs(body, LONGEST_ANSWER)
        if len(answer) < SHORTEST_ANSWER or answer in seen:
            continue
        seen.add(answer)
        title = re.sub(r"^(The|A|An)\b", lambda match: match[0].lower(), title)
        question = _choose(ASK_DOCUMENTATION, title).format(title=title)
        yield _messages([Turn(question=question, next_question=question, answer=answer)], f"{name} {title}")


def first_paragraphs(text: str, limit: int) -> str:
    """As many whole paragraphs from the beginning as fit into `limit` characters; "" if not even one."""
    kept = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        longer = f"{kept}\n\n{paragraph}" if kept else paragraph
        if len(longer) > limit:
            break
        kept = longer
    # A paragraph that announces something which was then cut off would end in the air.
    return re.sub(r"\n\n[^\n]*(\n[^\n]+)*:$", "", kept) if len(kept) < len(text.strip()) else kept


def _module_turns(module: Module) -> Iterator[Turn]:
    introduction = first_paragraphs(module.docstring, LONGEST_ANSWER)
    if introduction and not module.name.rpartition(".")[2].startswith("_"):
        question = _choose(ASK_MODULE, module.path).format(name=module.name)
        yield Turn(question=question, next_question=question, answer=introduction)
    for definition in module.definitions:
        yield from _definition_turns(module, definition)


def _definition_turns(module: Module, definition: Definition) -> Iterator[Turn]:
    key = f"{module.path} {definition.name}"
    fields = {
        "name": definition.name,
        "signature": definition.signature,
        "module": module.name,
        "kind": "method" if definition.is_method else "function",
        "task": first_paragraphs(definition.docstring, LONGEST_TASK),
    }
    explanation = first_paragraphs(definition.docstring, LONGEST_ANSWER)
    explains = len(explanation) >= SHORTEST_ANSWER and _choose((True, True, False), "explain " + key)
    if explains:
        yield Turn(
            question=_choose(ASK_EXPLANATION, key).format(**fields),
            next_question=_choose(ASK_EXPLANATION_NEXT, key).format(**fields),
            answer=explanation,
        )
    if definition.source and fields["task"] and _choose((True, True, False), "write " + key):
        question = _choose(ASK_CODE, key).format(**fields)
        yield Turn(
            question=question,
            # Only right after its explanation is the name of a function enough to ask for its code.
            next_question=_choose(ASK_CODE_NEXT, key).format(**fields) if explains else question,
            answer=f"```python\n{definition.source}\n```",
        )


def _messages(turns: Sequence[Turn], key: str) -> list[dict[str, str]]:
    messages = []
    if _choose((True, False, False), "system " + key):
        messages.append({"role": "system", "content": _choose(SYSTEM, key)})
    for index, turn in enumerate(turns):
        question = turn.next_question if index else turn.question
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _choose(options: Sequence[Choice], key: str) -> Choice:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return options[int.from_bytes(digest[:8], "big") % len(options)]
