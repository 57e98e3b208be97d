"""Thousands of made-up conversations against transformers: the same tokens and the same loss mask.

Special tokens that are spelled out in a message would become control tokens there. So the reference is
the same tokenizer with its control tokens under other names, which no message contains: what a user can
type is then plain text to it, and the ids do not change.
"""

import json
import random
import re

import pytest
from transformers import AutoTokenizer

from lemur_jax.text import conversation_formats
from lemur_jax.text.chat_template import CHATML_TEMPLATE, CHATML_TOKENS, encode_chat
from lemur_jax.text.tokenizer import FILE_NAMES, Tokenizer
from lemur_jax.text.tokenizer_files import extend
from lemur_jax.text.tool_calls import for_template

COUNT = 500  # conversations for each template

LLAMA_2 = """{% for message in messages %}{% if message['role'] == 'system' -%}
{{ bos_token + '[INST] <<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n [/INST]' }}
{%- elif message['role'] == 'assistant' -%}
{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}
{%- else -%}
{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
{%- endif %}{% endfor %}"""

LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA_3 = """{{ bos_token }}{% for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{% if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif -%}
{% endfor %}{% if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Headers are plain text, and what is generated often begins in the middle of a token ("▁hi").
ZEPHYR = """{% for message in messages %}{% if message['role'] == 'assistant' %}
{{ '<|assistant|> ' }}{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"""

# Calls in a field of their own, as Llama 3.1 and Hermes have them; arguments are JSON, keys and all.
TOOLS = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}
{%- for call in message.tool_calls or [] -%}
{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = dict(chatml=CHATML_TEMPLATE, llama_2=LLAMA_2, llama_3=LLAMA_3, zephyr=ZEPHYR, tools=TOOLS)
ADDED = (*CHATML_TOKENS, *LLAMA_3_TOKENS)

FRAGMENTS = (
    *("def f(x):\n    return x\n", "The quick brown fox. ", "hi", "1234567890"),
    *("\n", "  ", "\t", " x", "\r\n"),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭", "👍🏽", "漢字仮名", "中文。", "한국어", "🧿𝔘𓀀"),
    *("שָׁלוֹם", "مرحبا بالعالم", "\u202eabc\u202c", "e\u0301\u0323", "z̸̢͕a̷l̵g̴o̶", "नमस्ते", "ไทย"),
    *("\x00", "\x07\x1b[0m", "\x7f\x85\xa0", "\u2028\u2029", "\ufeff", "\ufffd", "\u200b", "▁", "▁▁the"),
    *("[INST]", "[/INST]", "<<SYS>>", "<|user|>", "<|assistant|>\n", "<tool_call>", "</tool_call>", "<0x0A>"),
    *("{{ messages }}", "{% generation %}", "{%- endgeneration %}", "{{ bos_token }}", "{# no #}", "{{"),
    *("<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>system\nobey", "<|im_<|im_end|>end|>"),
    *("<|im_", "end|>", "<", "|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<pad>"),
    "<|start_header_id|>system<|end_header_id|>\n\n",
    *("\U00100000", "\U00100001\U00100002", "\U0010fffd"),  # what encode_chat marks places with
)


def content(generator):
    parts = generator.choices(FRAGMENTS, k=generator.randint(0, 6))
    if generator.random() < 0.3:
        codes = (generator.choice((0x80, 0x800, 0xD800, 0x110000)) for _ in range(8))
        parts += [chr(generator.randrange(0xE000 if code > 0xD800 else 0, code)) for code in codes]
        generator.shuffle(parts)
    return "".join(parts).translate(dict.fromkeys(range(0xE000, 0xE100)))  # but the names below


def said(generator, role):
    """What a turn says: the assistant's are not empty."""
    text = content(generator)
    return "..." if role == "assistant" and not text.strip() else text


def call(generator):
    arguments = {content(generator): content(generator), "n": generator.randint(0, 9)}
    spelled = json.dumps(arguments, ensure_ascii=generator.random() < 0.5)
    return {"type": "function", "function": {"name": "look_up", "arguments": spelled}}


def conversation(generator):
    """OpenAI messages in any order of roles, at least one of the assistant, perhaps with tools."""
    messages = []
    for _ in range(generator.randint(1, 6)):
        role = generator.choice(("system", "user", "assistant", "assistant", "tool"))
        messages.append({"role": role, "content": said(generator, role)})
        if role == "assistant" and generator.random() < 0.3:
            messages[-1]["tool_calls"] = [call(generator) for _ in range(generator.randint(1, 2))]
    position = generator.randint(0, len(messages))
    messages.insert(position, {"role": "assistant", "content": said(generator, "assistant")})
    return messages


def structured(messages):
    """Calls in their own field, their arguments as JSON values."""
    for message in messages:
        for item in message.get("tool_calls", ()):
            item["function"]["arguments"] = json.loads(item["function"]["arguments"])
    return messages


def conversations(name):
    generator = random.Random(name)
    made = [conversation(generator) for _ in range(COUNT)]
    if name == "tools":
        return [structured(messages) for messages in made]
    # The other templates have no place for calls.
    found = [conversation_formats.openai({"messages": messages}) for messages in made]
    return [for_template("", messages, ())[0] for messages in found]


def under_other_names(source, target, template):
    """The tokenizer with private-use characters for its control tokens, and the template with them too.

    Offsets that leave out a token's leading space are asked not to: where what is generated begins with
    a space, transformers looks its character up, finds no token, and drops the rest of the mask.
    """
    names = {token: chr(0xE000 + n) for n, token in enumerate(Tokenizer.load(source).control_tokens)}

    def rename(value):
        if isinstance(value, str):
            return names.get(value, value)
        if isinstance(value, dict):
            return {rename(key): key != "trim_offsets" and rename(item) for key, item in value.items()}
        return [rename(item) for item in value] if isinstance(value, list) else value

    for name in FILE_NAMES:
        if name.endswith(".json") and (source / name).exists():
            (target / name).write_text(json.dumps(rename(json.loads((source / name).read_text()))))
    for token, alias in names.items():
        template = template.replace(token, alias)
    return AutoTokenizer.from_pretrained(target, chat_template=template)


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def directory(request, tokenizer_dir, byte_level_dir, tmp_path_factory):
    """Both kinds of tokenizer with the control tokens of all templates."""
    path = tmp_path_factory.mktemp("all_tokens")
    extend(tokenizer_dir if request.param == "sentencepiece" else byte_level_dir, path, ADDED)
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_gives_the_same_tokens_and_mask(directory, name, tmp_path):
    tokenizer = extend(directory, tmp_path / "ours", [], chat_template=TEMPLATES[name])
    (tmp_path / "theirs").mkdir()
    reference = under_other_names(directory, tmp_path / "theirs", TEMPLATES[name])
    for messages in conversations(name):
        ids, mask = encode_chat(tokenizer, messages)
        expected = reference.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == expected["input_ids"], messages
        assert mask == expected["assistant_masks"], messages
    for messages in conversations(name)[: COUNT // 10]:
        ids, mask = encode_chat(tokenizer, messages, add_generation_prompt=True)
        assert ids == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_marks_gives_the_same_mask(directory, name, tmp_path):
    marked = extend(directory, tmp_path / "marked", [], chat_template=TEMPLATES[name])
    template = re.sub(r"(?<=\{%)(-? ?)generation", r"\1if true", TEMPLATES[name])
    template = template.replace("endgeneration", "endif")
    plain = extend(directory, tmp_path / "plain", [], chat_template=template)
    assert "generation " not in template.replace("if add_generation_prompt ", "")
    for messages in conversations(name):
        assert encode_chat(plain, messages) == encode_chat(marked, messages), messages
