import importlib.resources
import itertools
import json

import pytest
from transformers import AutoTokenizer

from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import check_template, encode_chat, render_chat, stop_ids
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import extend, revise


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def hf(chat_dir):
    return AutoTokenizer.from_pretrained(chat_dir)


def hf_chat(hf, messages, **options):
    encoded = hf.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return encoded["input_ids"], encoded["assistant_masks"]


@pytest.fixture(scope="module")
def with_template(chat_dir, tmp_path_factory):
    """with_template(source) -> the tokenizer with another chat template."""

    def make(template: str) -> Tokenizer:
        return extend(chat_dir, tmp_path_factory.mktemp("template"), [], chat_template=template)

    return make


def test_arguments_of_tojson_and_variables_are_those_of_transformers(hf, with_template):
    template = "{% for m in messages %}{{ m|tojson }}{{ m|tojson(true, 1) }}{{ m|tojson(sort_keys=true) }}{% endfor %}"
    template += "{{ documents is none }}"
    messages = messages_of([("user", "Köln")])
    expected = hf.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert render_chat(with_template(template), messages) == expected


def test_a_conversation_as_text(chat_tokenizer):
    messages = messages_of([("user", "hi <s>"), ("assistant", "yo")])
    text = "<|im_start|>user\nhi <s><|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert render_chat(chat_tokenizer, messages) == text


def supervised_text(tokenizer, messages):
    ids, mask = encode_chat(tokenizer, messages)
    return tokenizer.decode([701, *(index for index, flag in zip(ids, mask, strict=True) if flag)])[12:]


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0, "train": True}],
)
def test_turns_with_weight_0_are_not_supervised(chat_tokenizer, flag):
    messages = messages_of([("user", "q"), ("assistant", " bad \n"), ("user", "q"), ("assistant", "good")])
    whole = encode_chat(chat_tokenizer, messages)[0]
    messages[1] |= flag
    messages[3] |= {"weight": 1, "train": None}
    assert supervised_text(chat_tokenizer, messages) == "good<|im_end|>\n"
    assert encode_chat(chat_tokenizer, messages)[0] == whole
    with pytest.raises(UserError, match="no supervised token.*weight 0"):
        encode_chat(chat_tokenizer, messages[:2])


@pytest.mark.parametrize(
    "flag", [{"weight": 0.5}, {"train": "no"}, {"weight": [0]}, {"train_detail": [{"train": False}]}]
)
def test_a_weight_between_0_and_1_is_refused(chat_tokenizer, flag):
    messages = [{"role": "assistant", "content": "x", **flag}]
    with pytest.raises(UserError, match="only 0 and 1|only whole turns"):
        encode_chat(chat_tokenizer, messages)


def test_stop_ids(tokenizer, chat_tokenizer, chat_dir, tokenizer_dir, tmp_path):
    assert stop_ids(tokenizer) == (2,)
    assert stop_ids(chat_tokenizer) == (chat_tokenizer.control_tokens["<|im_end|>"], 2)
    llama_3 = extend(tokenizer_dir, tmp_path / "3", ["<|eot_id|>"])
    assert stop_ids(llama_3) == (llama_3.control_tokens["<|eot_id|>"], 2)
    both = extend(chat_dir, tmp_path / "both", ["<|eot_id|>"])
    assert stop_ids(both) == (*(both.control_tokens[name] for name in ("<|im_end|>", "<|eot_id|>")), 2)


def published(name: str) -> str:
    """A chat template as its model's publisher has it, from the package TRL, which marks spans in a copy of each."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    return (importlib.resources.files("trl") / f"chat_templates/{name}.jinja").read_text()


@pytest.mark.parametrize(
    "model",
    ["gemma", "gemma3", "llama3", "phi3", "phi3_5", "qwen2_5", "qwen3", "qwen3_instruct_2507", "cohere2"],
)
def test_spans_of_published_templates(chat_dir, tmp_path, hf, model):
    """Without marks, the answers are those that TRL marks, but for newlines around them."""
    # Phi's, which ends each turn and is not eos.
    tokenizer = extend(chat_dir, tmp_path, ["<|end|>"], chat_template=published(model))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    talk = [("user", "What is 2 + 2?"), ("assistant", "4"), ("user", "And 3 + 3?"), ("assistant", "It is 6.")]
    if model not in ("gemma", "gemma3"):  # they take no system turn, or write it into the first question
        talk = [("system", "Be brief."), *talk]
    messages = messages_of(talk)
    marked = hf_chat(theirs, messages, chat_template=published(f"{model}_training"))
    ids, mask = encode_chat(tokenizer, messages)
    assert ids == marked[0]

    def answers(mask):
        runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda token: token[1])
        return [theirs.decode([token for token, _ in run]).strip("\n") for kept, run in runs if kept]

    assert len(answers(mask)) == 2
    assert answers(mask) == answers(marked[1])


@pytest.mark.parametrize(
    "turn",
    [
        "{{ m.content.split('</think>')[-1] if not loop.last and m.role == 'assistant' else m.content }}",
        "{{ '<think>' if loop.last and m.role == 'assistant' }}{{ m.content }}",
    ],
)
def test_an_answer_that_a_template_rewrites_later_stays_as_it_was_given(with_template, turn):
    tokenizer = with_template("{% for m in messages %}" + turn + "<|im_end|>{% endfor %}")
    check_template(tokenizer)
    answer = ("assistant", "<think>t</think>a")
    talk = [("user", "q"), answer, ("user", "r"), ("tool", "s"), ("assistant", "b")]
    ids, mask = encode_chat(tokenizer, messages_of(talk))
    think = "<think>" if "loop.last and m" in turn and "split" not in turn else ""
    first, last = f"{think}<think>t</think>a<|im_end|>", f"{think}b<|im_end|>"
    assert tokenizer.decode(ids) == f"q<|im_end|>{first}r<|im_end|>s<|im_end|>{last}"
    assert tokenizer.decode([index for index, flag in zip(ids, mask, strict=True) if flag]) == first + last
    assert len(render_chat(tokenizer, messages_of(talk))) < len(tokenizer.decode(ids))


@pytest.mark.parametrize(
    "turn",
    [
        "{{ m.content }}{{ '<|im_end|>' if loop.last }}",
        "{{ m.content }}{{ eos_token if loop.last and m.role == 'assistant' }}",
        "{{ m.content if loop.last }}<|im_end|>",
    ],
)
def test_an_answer_that_does_not_follow_its_prompt_or_ends_differently_is_refused(with_template, turn):
    tokenizer = with_template("{% for m in messages %}" + turn + "{% endfor %}")
    messages = messages_of([("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b")])
    with pytest.raises(UserError, match=r"^the chat template does not write turn 1 as it would be"):
        encode_chat(tokenizer, messages)
    with pytest.raises(UserError, match="does not write turn 1"):
        check_template(tokenizer)


def test_a_first_turn_of_the_assistant_that_has_no_prompt(with_template):
    tokenizer = with_template(
        "{{ messages[0].content if messages[0].role == 'system' }}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    messages = messages_of([("assistant", "hello"), ("user", "q"), ("assistant", "a")])
    with pytest.raises(UserError, match='generation prompt of turn 0, .* give it "weight": 0'):
        encode_chat(tokenizer, messages)
    messages[0]["weight"] = 0
    assert supervised_text(tokenizer, messages) == "a<|im_end|>"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{{ raise_exception('roles alternate') }}", "roles alternate"),
        ("{{ namespace(clear=1).clear }}{{ messages.clear() }}", "access to .* 'clear' of 'list' .* unsafe"),
    ],
)
def test_a_template_that_refuses_or_is_refused(with_template, body, reason):
    tokenizer = with_template(f"{{% generation %}}{body}{{% endgeneration %}}")
    with pytest.raises(UserError, match=f"^the chat template says: {reason}"):
        encode_chat(tokenizer, messages_of([("assistant", "x")]))


def test_what_cannot_be_trained_on_is_refused(tokenizer, chat_tokenizer):
    with pytest.raises(UserError, match=r"no <\|im_start\|> and <\|im_end\|>"):
        encode_chat(tokenizer, messages_of([("assistant", "x")]))
    messages = messages_of([("user", "anyone?"), ("system", "no")])
    with pytest.raises(UserError, match=r"no supervised token.*user, system"):
        encode_chat(chat_tokenizer, messages)
    assert not any(encode_chat(chat_tokenizer, messages, add_generation_prompt=True)[1])


@pytest.mark.parametrize(
    "messages", [[], "hi", {"role": "user"}, ["hi"], [{"role": "user"}], [{"role": "user", "content": None}]]
)
def test_malformed_messages_are_refused(chat_tokenizer, messages):
    with pytest.raises(UserError, match="expected a (list|mapping)"):
        encode_chat(chat_tokenizer, messages)


def with_generation_config(chat_dir, eos):
    config = json.dumps({"eos_token_id": eos}).encode()
    return Tokenizer.from_files(Tokenizer.load(chat_dir).files() | {"generation_config.json": config})


@pytest.mark.parametrize(("eos", "added"), [([2, 7, 9], (7, 9)), (11, (11,)), (None, ()), ([], ())])
def test_ids_of_generation_config_end_an_answer(chat_dir, eos, added):
    tokenizer = with_generation_config(chat_dir, eos)
    expected = (*stop_ids(Tokenizer.load(chat_dir)), *added)
    assert stop_ids(tokenizer) == expected
    assert stop_ids(Tokenizer.from_files(tokenizer.files())) == expected
    assert set(added) <= set(stop_ids(Tokenizer.from_files(revise(tokenizer, add=["<new>"]))))


@pytest.mark.parametrize("eos", ["2", [True], [-1], {"a": 1}])
def test_stop_ids_that_are_no_ids_are_refused(chat_dir, eos):
    with pytest.raises(UserError, match=r"eos_token_id of generation_config.json is"):
        with_generation_config(chat_dir, eos)
