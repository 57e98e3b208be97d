"""Published forms of conversations, each to the one normal form."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.prepare import readers
from lemur_jax.prepare.cleaning import filters, parse_steps
from lemur_jax.prepare.fields import Fields, to_documents
from lemur_jax.text import conversation_formats as formats


def talk(*turns):
    return [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]


QUESTION_ANSWER = talk(("user", "Why?"), ("assistant", "Because."))


def test_sharegpt():
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    assert formats.sharegpt({"conversations": turns}) == QUESTION_ANSWER
    assert formats.sharegpt({"conversation": QUESTION_ANSWER}) == QUESTION_ANSWER
    # As the dump of 2023 has them: an id, other names of the model, turns that follow one another.
    row = {"id": "QWJhYvA_0", "conversations": [{"from": "human", "value": "Why?", "markdown": None}]}
    row["conversations"] += [{"from": name, "value": name} for name in ("gpt", "bing", "bard", "chatgpt")]
    found = formats.sharegpt(row)
    assert [message["role"] for message in found] == ["user"] + ["assistant"] * 4


CALL = {"name": "f", "arguments": {"x": 1}}
TOOL = {"name": "f", "description": "Does.", "parameters": {}}


def calling(*calls):
    tool_calls = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def test_calls_and_tools_of_llama_factory_and_of_hermes():
    turns = [
        ("human", "Why?"), ("function_call", json.dumps(CALL)), ("observation", "r"),
        ("function_call", json.dumps([CALL, CALL])), ("function", "r"), ("gpt", "Because."),
    ]  # fmt: skip
    turns = [{"from": role, "value": value} for role, value in turns]
    row = {"conversations": turns, "system": "S", "tools": json.dumps([TOOL])}
    result, system = talk(("tool", "r"))[0], talk(("system", "S"))[0]
    question, answer = QUESTION_ANSWER
    expected = [system, question, calling(CALL), result, calling(CALL, CALL), result, answer]
    assert formats.sharegpt(row) == {"messages": expected, "tools": [{"type": "function", "function": TOOL}]}
    described = {"from": "system", "value": f"<tools> {row['tools']} </tools>"}
    found = formats.sharegpt({"conversations": [described, *turns], "tools": row["tools"]})
    assert [message["content"] for message in found[:2]] == [described["value"], "Why?"]


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [{"function": {"name": "f", "parameters": '{"x": 1}'}}],
        [CALL | {"y": None}],
    ],
)
def test_calls_as_others_spell_them(calls):
    messages = [QUESTION_ANSWER[0], {"role": "assistant", "tool_calls": calls}]
    found = formats.openai({"messages": messages, "functions": [TOOL]})
    assert found["messages"] == [QUESTION_ANSWER[0], calling(CALL)]
    assert found["tools"] == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("openai", {"messages": QUESTION_ANSWER}),
        ("openai", {"messages": [*talk(("system", "S")), *QUESTION_ANSWER]}),
        ("sharegpt", {"conversations": QUESTION_ANSWER}),
        ("openorca", {"question": "Why?", "response": "Because."}),
        ("evol_code_alpaca", {"instruction": "Why?", "output": "Because."}),
        ("completion", {"prompt": "Why?", "completion": "Because."}),
    ],
)
def test_the_system_prompt_of_a_row_comes_first(name, row, key):
    assert getattr(formats, name)(row | {key: "S"}) == [*talk(("system", "S")), *QUESTION_ANSWER]
    assert getattr(formats, name)(row | {key: ""})[-2:] == QUESTION_ANSWER
    assert len(getattr(formats, name)(row | {key: "S\n"})) == 3


def test_evol_code_alpaca():
    row = {"instruction": "Sort.", "input": "3 1", "output": "1 3", "history": [["Why?", "Because."]]}
    expected = [*QUESTION_ANSWER, *talk(("user", "Sort.\n\n3 1"), ("assistant", "1 3"))]
    assert formats.evol_code_alpaca(row) == expected


def reply(role, text, *replies, **more):
    return {"role": role, "text": text, "lang": "en", "replies": list(replies), **more}


def flat(*messages):
    """Rows as OpenAssistant's Parquet files have them: (id, parent, role, text, and what else is not usual)."""
    usual = {"lang": "en", "deleted": False, "rank": None, "message_tree_id": "t", "synthetic": False}
    names = ("message_id", "parent_id", "role", "text")
    return [usual | dict(zip(names, m, strict=False)) | (m[4] if len(m) > 4 else {}) for m in messages]


TREE = flat(
    ("q", None, "prompter", "What is a monopsony?"),
    ("a1", "q", "assistant", "second", {"rank": 1}),
    ("a4", "q", "assistant", "unranked"),
    ("a0", "q", "assistant", "deleted", {"rank": 0, "deleted": True}),
    ("q2", "a2", "prompter", "Now in verse.", {"rank": None}),
    ("a2", "q", "assistant", "best that is left", {"rank": 0}),
    ("a3", "q2", "assistant", "Roses are red."),
    ("q3", "a3", "prompter", "Thanks!"),
)


def test_openassistant_of_flat_messages_is_the_path_of_their_tree():
    found = formats.openassistant_messages({"rows": TREE})
    path = ["What is a monopsony?", "best that is left", "Now in verse.", "Roses are red."]
    assert found == talk(*zip(("user", "assistant") * 2, path, strict=True))
    # As the nested release has the same tree; the order of the rows is that of unranked replies alone.
    nodes = {row["message_id"]: row | {"replies": []} for row in TREE}
    for node in nodes.values():
        if node["parent_id"]:
            nodes[node["parent_id"]]["replies"].append(node)
    assert formats.openassistant({"prompt": nodes["q"]}) == found
    assert formats.openassistant_messages({"rows": TREE[::-1]}) == found


FLAT = Fields(
    messages=formats.openassistant_messages, gather="message_tree_id", id="message_tree_id", meta=("lang",)
)


@pytest.mark.parametrize("form", ["parquet", "jsonl.gz"])
def test_flat_messages_as_the_hub_ships_them(tmp_path, form):
    """Trees one after the other; languages filtered; a tree in pieces and one without an answer are bad."""
    german = [row | {"message_tree_id": "d", "lang": "de"} for row in TREE]
    lonely = [row | {"message_tree_id": "l"} for row in TREE[:1]]
    rows = [*TREE, *german, *lonely, *(row | {"message_tree_id": "p"} for row in TREE[1:])]
    path = tmp_path / f"train-00000-of-00001.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    read = readers.read_rows(str(path), form.partition(".")[0])
    first, second, *bad = (document for document, _ in to_documents(str(path), read, FLAT))
    assert (first["id"], second["id"]) == (b"t", b"d")
    assert json.loads(first["messages"]) == json.loads(second["messages"])
    assert len(json.loads(first["messages"])) == 4
    assert [json.loads(document["error"])["reason"] for document in bad] == [
        "no turn of the assistant",
        "message a1 answers q, which is not beside it: a tree is in pieces",
    ]
    assert bad[0]["where"].decode() == f"{path}: {'row 16' if form == 'parquet' else 'line 17'}"
    languages = filters(parse_steps("t", {"metadata": {"lang": ("en",)}}))
    stay = [languages.remove("x", "", json.loads(document["meta"])) is None for document in (first, second)]
    assert stay == [True, False]


def test_bytes_of_tfds_and_tfrecord_are_text_to_a_function_and_in_metadata():
    row = {"question": b"Why?", "response": b"Because.", "image": b"\xff", "n": 1}
    row["tags"] = {"licences": [b"mit", "Grüße".encode()]}
    fields = Fields(messages=formats.openorca, meta=("tags", "n"))
    ((document, _),) = to_documents("f", [("row 0", row)], fields)
    assert (json.loads(document["messages"]), document["error"]) == (QUESTION_ANSWER, b"")
    assert json.loads(document["meta"]) == {"tags": {"licences": ["mit", "Grüße"]}, "n": 1}
    pair = {"prompt": b"Why?", "chosen": b"Because.", "rejected": b"No."}
    ((document, _),) = to_documents("f", [("row 0", pair)], Fields(preferences=formats.preference))
    assert json.loads(document["preferences"])["chosen"] == QUESTION_ANSWER
    ((document, _),) = to_documents("f", [("row 0", row)], Fields(text="image"))
    assert "invalid UTF-8" in json.loads(document["error"])["reason"]


def test_openai_with_tools():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "D", "name": None},
        {
            "role": "user",
            "name": "Ada",
            "content": [{"type": "text", "text": "1 + "}, {"type": "input_text", "text": "2?"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "name": "add", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    question, answer = talk(("system", "D"), ("user", "1 + 2?")), talk(("assistant", "It is 3."))
    expected = [*question, *talk(("assistant", ""), ("tool", "3")), *answer]
    expected[2]["tool_calls"] = [{**call, "function": {"name": "add", "arguments": {"a": 1}}}] * 2
    expected[1]["name"] = "Ada"
    expected[3] |= {"tool_call_id": "1", "name": "add"}
    assert formats.openai({"messages": messages}) == expected


def test_turns_that_are_not_to_be_trained_on():
    bad, good = talk(("assistant", "bad"), ("assistant", "a"))
    turns = [{"from": "gpt", "value": "bad", "weight": 0}, {"from": "gpt", "value": "a"}]
    assert formats.sharegpt({"conversations": turns}) == [bad | {"train": False}, good]
    good["reasoning_content"] = "because"
    empty = bad | {"content": "", "train": False}
    assert formats.openai({"messages": [empty, good | {"weight": 1, "thinking": None}]}) == [empty, good]
    prompt, other = talk(("user", "q"), ("assistant", "b"))
    row = {"prompt": [prompt], "chosen": [bad | {"loss": False}, prompt, good], "rejected": [other]}
    chosen = formats.preference(row)["chosen"]
    assert [turn.get("train", True) for turn in chosen] == [True, False, True, True]


def test_null_fields_are_absent():
    turns = [
        {"from": None, "value": None, "role": "user", "content": "q"},
        {"from": "gpt", "value": "a", "role": None, "content": None, "weight": None},
    ]
    row = {"conversation": None, "conversations": turns, "system": None}
    assert formats.sharegpt(row) == talk(("user", "q"), ("assistant", "a"))
    call = {"name": "f", "arguments": {"x": 1, "y": None, "z": [{"u": None, "v": 2}]}}
    (turn,) = formats.openai({"messages": [{"role": "assistant", "content": None, "function_call": call}]})
    assert turn["tool_calls"][0]["function"]["arguments"] == {"x": 1, "z": [{"v": 2}]}


def called(arguments):
    return {"conversations": [{"role": "assistant", "function_call": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("sharegpt", {}, "no field 'conversations'"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": ""}]}, "unknown role 'alien'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}]}, "no turn of the assistant"),
        ("sharegpt", {"conversations": ["q"]}, "'q' stands where a field 'role' is wanted"),
        ("sharegpt", {"conversations": "q"}, "'conversations' is str, not a list"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "are not JSON"),
        ("sharegpt", {"images": ["a"], "conversations": talk(("gpt", "A cat: <image>"))}, "for its <image>"),
        ("openai", {"audio": "a", "messages": talk(("assistant", "<audio>"))}, "for its <audio>"),
        ("completion", {"prompt": "q", "answer": "a"}, "no field 'completion'; there are prompt, answer"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "no field 'value'"),
        ("openorca", {"question": None, "response": "a"}, "no field 'question'"),
        ("openorca", {"system_prompt": 3, "question": "q", "response": "a"}, "turn of system is int"),
        ("openorca", {"question": "q"}, "no field 'response'"),
        ("evol_code_alpaca", {"instruction": "q", "output": 3}, "is int, not a string"),
        ("openassistant", {}, "no turn of the assistant"),
        ("openassistant", {"prompt": {"role": "prompter", "text": "q"}}, "no turn of the assistant"),
        ("openassistant", {"prompt": reply("prompter", "q", deleted=True)}, "prompt was deleted"),
        ("openassistant", {"prompt": reply("moderator", "q")}, "unknown role 'moderator'"),
        ("openassistant_messages", {"text": "q"}, "no field 'rows'; there are text"),
        ("openassistant_messages", {"rows": [{"text": "q"}]}, "no field 'message_id'"),
        ("openassistant_messages", {"rows": flat(("q", None), ("r", None))}, "2 messages that answer none"),
        (
            "openassistant_messages",
            {"rows": flat(("q", "r", "prompter", ""), ("r", "q", "assistant", ""))},
            "0 messages that answer none",
        ),
        ("openai", {"messages": None}, "no field 'messages'"),
        ("openai", {"messages": [{"role": "assistant", "text": "a"}]}, "no field 'content'"),
        ("openai", {"messages": [{"role": "user", "content": None}]}, "no field 'content'"),
        ("openai", {"messages": [{"role": "assistant", "content": None, "refusal": "No."}]}, "no field"),
        ("openai", {"messages": [{"role": "assistant", "content": " "}]}, "a turn of assistant is empty"),
        ("openai", {"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "weight 0 or train"),
        ("openai", {"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, "only 0 and 1"),
        ("openai", {"messages": [{"role": "user", "content": 3}]}, "content is int"),
        ("openai", {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "no field 'type'"),
        ("openai", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "no field 'name'"),
        ("openai", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ("sharegpt", called("{"), "arguments of the call of 'f' are not JSON"),
        ("sharegpt", called(json.dumps("{}")), "arguments of the call of 'f' are '{}', not an object"),
    ],
)
def test_what_cannot_be_read_says_why(name, row, reason):
    with pytest.raises((ValueError, UserError), match=reason):
        getattr(formats, name)(row)
