"""Conversations with tools, through the templates of published models, against transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lemur_jax.common.errors import UserError
from lemur_jax.prepare.encoding import Encoded, encode
from lemur_jax.prepare.fields import Fields, to_documents
from lemur_jax.text import conversation_formats as formats
from lemur_jax.text.chat_template import encode_chat
from lemur_jax.text.tokenizer_files import extend
from lemur_jax.text.tool_calls import for_template

# TRL has the templates of models as they are published, and copies with marks of what is generated.
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

MARKED = ("qwen2_5_training", "qwen3_training", "glm4moe_training", "gptoss_training", "lfm2_v2_training")

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}]


def conversation(content=None, **flags):
    """As OpenAI's API has it: arguments are JSON."""
    function = {"name": "weather", "arguments": '{"city": "Köln"}'}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": content, "tool_calls": [call], **flags},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": 'Sunny, "very".'},
        {"role": "assistant", "content": "The sun shines."},
    ]


def trained_text(tokenizer, ids, mask):
    return tokenizer.decode([index for index, flag in zip(ids, mask, strict=True) if flag])


@pytest.fixture(scope="module")
def with_template(chat_dir, tmp_path_factory):
    """with_template(name) -> our tokenizer and that of transformers with one of TRL's templates."""

    def make(name):
        template = (TEMPLATES / f"{name}.jinja").read_text()
        ours = extend(chat_dir, tmp_path_factory.mktemp(name), [], chat_template=template)
        return ours, AutoTokenizer.from_pretrained(chat_dir, chat_template=template)

    return make


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None], ids=["list", "json", "none"])
@pytest.mark.parametrize("name", [*MARKED, "llama3_1"])
def test_ids_and_mask_are_those_of_transformers(with_template, name, tools):
    ours, theirs = with_template(name)
    talk = formats.openai({"messages": conversation(), "tools": tools})
    messages, shown = (talk["messages"], talk["tools"]) if tools else (talk, ())
    ids, mask = encode_chat(ours, messages, tools=shown)
    expected = theirs.apply_chat_template(
        messages, tools=shown or None, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == expected["input_ids"]
    if name == "llama3_1":  # has no marks
        said = trained_text(ours, ids, mask)
        assert '{"name": "weather", "parameters": {"city": "Köln"}}' in said
        assert "Sunny" not in said
    else:
        assert mask == expected["assistant_masks"]


def test_variables_of_a_row_reach_the_template(with_template):
    ours, theirs = with_template("gptoss_training")

    def encoded(given):
        row = {"messages": conversation(), "tools": TOOLS, "chat_template_kwargs": given}
        ((document, _),) = to_documents("f", [("row", row)], Fields(messages=formats.openai))
        return encode(ours, document)

    # With characters that mark positions in the text.
    options = {"reasoning_effort": "high", "model_identity": "I am Köln. \U000f0000\U000f0001"}
    expected = theirs.apply_chat_template(
        formats.openai({"messages": conversation()}), tools=TOOLS, return_dict=True,
        return_assistant_tokens_mask=True, **options
    )  # fmt: skip
    unused = {"custom_instructions": "", "xml_tools": None, "enable_thinking": False}
    for given in (options | unused, json.dumps(options)):
        found = encoded(given)
        assert found.tokens.tolist() == expected["input_ids"]
        assert found.mask.tolist() == expected["assistant_masks"]
    assert "leaves out 'custom_instructions'" in encoded({"custom_instructions": "Be brief."}).reason
    assert "leaves out 'xml_tools'" in encoded({"xml_tools": ["f"]}).reason
    assert "is [1], not an object" in encoded([1]).reason
    assert "has 'tools', which is given beside them" in encoded({"tools": TOOLS}).reason


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", ["qwen3_training", "gptoss_training"])
def test_thoughts_are_written_under_any_name(with_template, name, key):
    ours, theirs = with_template(name)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: "because"}]
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert "because" in theirs.decode(expected["input_ids"])
    found = encode_chat(ours, formats.openai({"messages": messages}))
    assert found == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize("name", ["qwen3_training", "llama3_1"])
def test_a_call_that_is_not_trained_on(with_template, name):
    ours, _ = with_template(name)
    both, last = (formats.openai({"messages": conversation(**flags)}) for flags in ({}, {"weight": 0}))
    (ids, mask), (same, fewer) = encode_chat(ours, both), encode_chat(ours, last)
    assert ids == same
    said = trained_text(ours, ids, fewer)
    assert "The sun shines." in said
    assert "weather" not in said
    assert sum(fewer) < sum(mask)


def test_templates_without_a_place_for_tools_get_text(chat_tokenizer):
    talk = formats.openai({"messages": conversation("I look."), "tools": TOOLS})
    ids, mask = encode_chat(chat_tokenizer, talk["messages"], tools=talk["tools"])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    user = (
        f"You can use these tools:\n{json.dumps(TOOLS)}\n"
        'Call one with <tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>; you see its result.\n\n'
        "How is the weather?"
    )
    said = [
        ("user", user), ("assistant", f"I look.\n{call}"), ("tool", 'Sunny, "very".'), ("assistant", "The sun shines.")
    ]  # fmt: skip
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
    assert chat_tokenizer.decode(ids) == text
    trained = trained_text(chat_tokenizer, ids, mask)
    assert call in trained
    assert "these tools" not in trained


def test_a_variable_of_another_name_is_no_place_for_tools():
    template = "{{ builtin_tools }}{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}
    (turn, called), tools = for_template(template, [{"role": "user", "content": "q"}, call], TOOLS)
    assert not tools
    assert "weather" in turn["content"]
    assert called["content"] == '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'


ROLES = ("user", "assistant", "system", "user", "assistant")
TURNS = [{"role": role, "content": f"text {number}"} for number, role in enumerate(ROLES)]


@pytest.mark.parametrize(
    ("name", "messages", "lost"),
    [
        ("llama3_1", conversation("I look."), r"the content of turn 1 \(assistant\)"),
        ("deepseek_r1_distill_training", conversation(), r"a call of turn 1 \(assistant\)"),
        ("phi3_training", conversation(), r"the content of turn 2 \(tool\)"),
        ("qwen2_5_training", [TURNS[0] | {"name": "Ada"}, TURNS[1]], r"the name of turn 0 \(user\)"),
        # Cohere's writes a later system turn into the first one, where answers before it would have seen it.
        ("cohere2", TURNS, r"the content of turn 2 \(system\)"),
    ],
)
def test_what_a_template_leaves_out_or_moves_is_refused(with_template, name, messages, lost):
    with pytest.raises(UserError, match=f"the chat template leaves out {lost}"):
        encode_chat(with_template(name)[0], formats.openai({"messages": messages}))


def test_a_template_that_names_calls_beside_their_results(chat_dir, tmp_path):
    """As Gemma 4's and gpt-oss's."""
    template = (
        "{% for m in messages %}"
        "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments|tojson }}{% endfor %}"
        "{% if m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].function.name }} says "
        "{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer = extend(chat_dir, tmp_path / "first", [], chat_template=template)
    trained = trained_text(tokenizer, *encode_chat(tokenizer, formats.openai({"messages": conversation()})))
    assert trained == 'weather{"city": "Köln"}<|im_end|>The sun shines.<|im_end|>'


def test_a_tool_that_a_template_leaves_out_is_refused(chat_dir, tmp_path):
    template = "{{ tools[0].function.name }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = extend(chat_dir, tmp_path / "first", [], chat_template=template)
    messages = [{"role": "assistant", "content": "hi"}]
    assert encode_chat(tokenizer, messages, tools=TOOLS)
    with pytest.raises(UserError, match="leaves out a tool"):
        encode_chat(tokenizer, messages, tools=[*TOOLS, {"function": {"name": "other"}}])


def test_a_control_token_in_a_tool_or_a_variable_is_text(with_template):
    ours, _ = with_template("gptoss_training")  # which writes none of these tokens itself
    messages = formats.openai({"messages": conversation()})
    tools = json.loads(json.dumps(TOOLS).replace("Now.", "Now.<|im_end|>"))
    variables = {"model_identity": "I am <|im_end|>."}
    ids, _ = encode_chat(ours, messages, tools=tools, chat_template_kwargs=variables)
    assert ours.decode(ids).count("<|im_end|>") == 2
    assert ours.control_tokens["<|im_end|>"] not in ids


def test_prepare_writes_tools_and_tells_calls_apart(chat_tokenizer):
    """Calls that differ in their ids alone are the same, and fall on one side of `held_out`."""
    spelled = json.dumps({"messages": conversation(), "tools": TOOLS})
    texts = (spelled, spelled.replace("K\\u00f6ln", "Oslo"), spelled.replace("abc", "x"))
    rows = [json.loads(text) for text in texts]
    steps = json.dumps({"exact_duplicates": True})
    found = list(to_documents("f", [("row", row) for row in rows], Fields(messages=formats.openai)))
    encoded = [encode(chat_tokenizer, document, steps) for document, _ in found]
    for same in ([each.fingerprints["digests"] for each in encoded], [key for _, key in found]):
        assert same[0] == same[2] != same[1]
    assert "these tools" in chat_tokenizer.decode(encoded[0].tokens.tolist())


def test_preferences_may_have_tools(chat_tokenizer):
    row = {"chosen": conversation(), "rejected": conversation(), "tools": TOOLS}
    row["rejected"][-1] = {"role": "assistant", "content": "No."}
    (document, _), *_ = to_documents("f", [("row", row)], Fields(preferences=formats.preference))
    result = encode(chat_tokenizer, document)
    assert isinstance(result, Encoded), result
    assert chat_tokenizer.decode(result.tokens.tolist()).count("these tools") == 2
    assert result.n_bytes == len("The sun shines.<|im_end|>\nNo.<|im_end|>\n") - 2 * len("<|im_end|>")


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("[{", "`tools` are not JSON"),
        ({"name": "f"}, "not a list of tools"),
        (["f"], "not a list of tools"),
        ([{"function": {}}], "not a list of tools with names"),
        ([{"function": "f"}], "not a list of tools with names"),
    ],
)
def test_tools_that_are_none(chat_tokenizer, tools, reason):
    with pytest.raises((ValueError, UserError), match=reason):
        formats.openai({"messages": conversation(), "tools": tools})
    if not isinstance(tools, str):
        talk = formats.openai({"messages": conversation(), "tools": "null"})
        with pytest.raises(UserError, match=reason):
            encode_chat(chat_tokenizer, talk, tools=tools)


def test_a_function_may_give_no_tools(chat_tokenizer):
    fields = Fields(messages=lambda row: {"messages": formats.openai(row), "tools": None})
    ((document, _),) = to_documents("f", [("row", {"messages": conversation()})], fields)
    assert isinstance(encode(chat_tokenizer, document), Encoded)


def test_tools_before_a_first_turn_of_the_assistant_are_not_trained_on(chat_tokenizer):
    messages = [{"role": "assistant", "content": "Hello."}, *formats.openai({"messages": conversation()})]
    ids, mask = encode_chat(chat_tokenizer, messages, tools=TOOLS)
    assert chat_tokenizer.decode(ids).startswith("<|im_start|>system\nYou can use these tools:")
    trained = trained_text(chat_tokenizer, ids, mask)
    assert trained.startswith("Hello.")
    assert "these tools" not in trained


@pytest.mark.parametrize(
    "calls", ["call", [{"name": "f"}], [{"function": {"name": 3}}], {"function": {"name": "f"}}]
)
def test_calls_that_are_none(chat_tokenizer, calls):
    with pytest.raises(UserError, match="tool_calls are"):
        encode_chat(chat_tokenizer, [{"role": "assistant", "content": "", "tool_calls": calls}])
