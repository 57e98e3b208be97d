"""Conversations made of documentation."""

import ast

import pytest

from lemur_jax.prepare import conversations, stdlib

MODULE = stdlib.read_module(
    "shapes.py",
    '''"""Shapes and what can be measured on them: areas, lengths and centres."""

def area(width, height):
    """Return the area of a rectangle of the given width and height."""
    return width * height

def copied(width, height):
    """Return the area of a rectangle of the given width and height."""
    return height * width

def short():
    """Brief."""
    return "a result that is long enough for an answer of its own"
''',
)


def talk(module=MODULE, seen=None):
    return list(conversations.about_module(module, set() if seen is None else seen))


def answers(talks):
    return [message["content"] for talk in talks for message in talk if message["role"] == "assistant"]


def test_roles_alternate_after_an_optional_system_message():
    talks = [talk for module in stdlib.modules()[:60] for talk in conversations.about_module(module, set())]
    for messages in talks:
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 1 <= len(turns) // 2 <= 3
    assert 0.2 < sum(talk[0]["role"] == "system" for talk in talks) / len(talks) < 0.5
    assert 0.2 < sum(len(talk) > 3 for talk in talks) / len(talks) < 0.6


def test_the_same_material_gives_the_same_conversations():
    assert talk() == talk()


def test_no_answer_is_given_twice():
    seen = set()
    first = answers(talk(seen=seen))
    assert len(set(first)) == len(first)
    assert first
    assert answers(talk(seen=seen)) == []


def test_answers_are_docstrings_and_code():
    found = answers(talk())
    assert MODULE.docstring in found
    known = {item.docstring for item in MODULE.definitions} | {MODULE.docstring}
    for answer in found:
        if answer.startswith("```python\n"):
            (function,) = ast.parse(answer.removeprefix("```python\n").removesuffix("\n```")).body
            assert ast.get_docstring(function) is None
        else:
            assert answer in known
    assert "Brief." not in found


def test_a_request_for_code_says_what_the_code_shall_do():
    for module in stdlib.modules()[:60]:
        docstrings = {item.docstring for item in module.definitions}
        for messages in conversations.about_module(module, set()):
            told = ""
            for message in messages:
                if message["role"] == "assistant" and message["content"].startswith("```"):
                    task = conversations.first_paragraphs
                    assert any(task(text, conversations.LONGEST_TASK) in told for text in docstrings)
                told += message["content"]


def test_topics_are_asked_by_title():
    text = 'The "assert" statement\n**********************\n\n' + "It inserts a debugging assertion. " * 3
    (messages,) = conversations.about_topic("assert", text, set())
    assert 'the "assert" statement' in messages[-2]["content"]
    assert messages[-1]["content"].startswith("It inserts")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(100, "One.\n\nTwo:\n\nThree."), (17, "One."), (5, "One."), (3, "")],
)
def test_first_paragraphs_are_whole_and_do_not_end_in_the_air(limit, expected):
    assert conversations.first_paragraphs("One.\n\nTwo:\n\nThree.\n", limit) == expected
