"""Published forms of conversations, each to the one normal form."""

import json

import pytest

from lemur_jax.data import chat_sources as sources
from lemur_jax.data.chat import encode_chat


def talk(*turns):
    return [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]


QUESTION_ANSWER = talk(("user", "Why?"), ("assistant", "Because."))


def test_sharegpt():
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    assert sources.sharegpt({"conversations": turns}) == QUESTION_ANSWER
    found = sources.sharegpt({"conversations": turns, "system": "Be kind."})
    assert found == talk(("system", "Be kind.")) + QUESTION_ANSWER


def test_openorca():
    row = {"system_prompt": "", "question": "Why?", "response": "Because."}
    assert sources.openorca(row) == QUESTION_ANSWER
    assert sources.openorca(row | {"system_prompt": "S"})[0] == talk(("system", "S"))[0]


def test_evol_code_alpaca():
    assert sources.evol_code_alpaca({"instruction": "Why?", "output": "Because."}) == QUESTION_ANSWER
    found = sources.evol_code_alpaca({"instruction": "Sort.", "input": "3 1", "output": "1 3"})
    assert found == talk(("user", "Sort.\n\n3 1"), ("assistant", "1 3"))


def reply(role, text, *replies, **more):
    return {"role": role, "text": text, "lang": "en", "replies": list(replies), **more}


def test_openassistant_takes_the_best_ranked_path():
    tree = reply(
        "prompter",
        "q",
        reply("assistant", "second", rank=1),
        reply("assistant", "unranked", reply("prompter", "more"), rank=None),
        reply(
            "assistant",
            "first",
            reply("prompter", "q2", reply("assistant", "deleted", rank=0, deleted=True)),
            reply("prompter", "not reached", reply("assistant", "x")),
            rank=0,
        ),
    )
    # The best reply is followed; the question after it has no answer left, so the path ends before it.
    assert sources.openassistant({"prompt": tree}) == talk(("user", "q"), ("assistant", "first"))
    tree["replies"][2]["replies"][0]["replies"].append(reply("assistant", "a2"))
    found = sources.openassistant({"prompt": tree})
    assert [m["content"] for m in found] == ["q", "first", "q2", "a2"]


def test_openai_with_tools():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    spelled = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert sources.openai({"messages": messages}) == talk(
        ("system", "D"),
        ("user", "1 + 2?"),
        ("assistant", f"{spelled}\n{spelled}"),
        ("tool", "3"),
        ("assistant", "It is 3."),
    )


def test_calls_are_trained_on_and_results_are_not(chat_tokenizer):
    function = {"name": "f", "arguments": {}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "function_call": function},
        {"role": "function", "content": "secret result"},
        {"role": "assistant", "content": "done"},
    ]
    ids, mask = encode_chat(chat_tokenizer, sources.openai({"messages": messages}))
    trained = chat_tokenizer.decode([i for i, flag in zip(ids, mask, strict=True) if flag])
    assert json.dumps(function) in trained
    assert "done" in trained
    assert "secret" not in trained


@pytest.mark.parametrize(
    ("function", "row", "reason"),
    [
        (sources.sharegpt, {}, "no list `conversations`"),
        (sources.sharegpt, {"conversations": [{"from": "alien", "value": ""}]}, "unknown role 'alien'"),
        (sources.sharegpt, {"conversations": [{"from": "gpt"}]}, "no field 'value'"),
        (sources.sharegpt, {"conversations": [{"from": "human", "value": "q"}]}, "no turn of the assistant"),
        (sources.openorca, {"question": "q"}, "no field 'response'"),
        (sources.evol_code_alpaca, {"instruction": "q", "output": 3}, "is int, not a string"),
        (sources.openassistant, {}, "no turn of the assistant"),
        (sources.openassistant, {"prompt": {"role": "prompter", "text": "q"}}, "no turn of the assistant"),
        (sources.openai, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        (
            sources.openai,
            {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}]},
            "arguments of the call of 'f' are not JSON",
        ),
    ],
)
def test_what_cannot_be_read_says_why(function, row, reason):
    with pytest.raises(ValueError, match=reason):
        function(row)
