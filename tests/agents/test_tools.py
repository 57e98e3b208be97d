"""Errands by scripted agents: calls, what the lazy user says when, and what mistakes are called."""

import json
import re
import sys
import types

import pytest

from lemur_jax.agents.environments import Step
from lemur_jax.agents.episodes import SessionAgent, failure, supports_tool_role
from lemur_jax.agents.page import agents_page
from lemur_jax.agents.tools import SHOP, TOOLS, schemas, tool_environments
from lemur_jax.rl.config import RlConfig
from lemur_jax.rl.episodes import Player
from lemur_jax.text.chat_template import CHATML_TOKENS, encode_chat
from lemur_jax.text.conversation_formats import openai
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.agents import run_episode, scripted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def errand(name):
    return next(one for one in tool_environments() if one.id == f"tools/{name}")


SOLUTIONS = {
    "status": [call("find_orders", customer="Ada"), call("get_order", number=1001), "Last seen in Leeds."],
    "total": [call("find_orders", customer="alan"), "Together 40 + 18 = 58."],
    "cancel": ["What is your name?", call("cancel_order", number="1004"), "Done."],
    "address": ["Where to?", call("set_address", number="1005", address="4 Hill Road"), "Done. More?"],
    "compute": [call("python", code="a, b = 0, 1\nfor _ in range(30): a, b = b, a + b\nprint(a)"), "832,040"],
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_every_errand_can_be_done(name):
    agent = scripted(*SOLUTIONS[name])
    trace = run_episode(errand(name), agent, max_turns=5)
    assert trace.solved_at == len(SOLUTIONS[name])
    roles = [message["role"] for message in agent.seen[-1]]
    assert roles[:2] == ["user", "assistant"]
    assert ("tool" in roles) == any("<tool_call>" in action for action in SOLUTIONS[name])


TURNS = "{% for m in messages %}WHICH<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\nEND{% endfor %}"
KNOWN = "{% if m.role in ('user', 'assistant') %}"
TEMPLATES = {
    "shows": TURNS.replace("WHICH", "").replace("END", ""),
    "refuses": TURNS.replace("WHICH", KNOWN).replace("END", "{% else %}{{ raise_exception('') }}{% endif %}"),
    "leaves out": TURNS.replace("WHICH", KNOWN).replace("END", "{% endif %}"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_results_of_calls_are_the_users_where_the_template_knows_no_tools(small_chat_tokenizer, name):
    files = {**small_chat_tokenizer.files(), "chat_template.jinja": TEMPLATES[name].encode()}
    tokenizer = Tokenizer.from_files(files)
    assert supports_tool_role(tokenizer) == (name == "shows")
    model = types.SimpleNamespace(max_position_embeddings=4096)
    agent = SessionAgent(types.SimpleNamespace(model=model, need_tokenizer=lambda: tokenizer))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = agent._prompt([*messages, {"role": "tool", "content": "[1001]"}], 4096)
    role = "tool" if name == "shows" else "user"
    assert f"{role}\n[1001]" in tokenizer.decode(ids)
    step = Step(observation="[1001]", verdict="", role="tool")
    player = Player(RlConfig(), tokenizer, 64)
    assert f"{role}\n[1001]" in tokenizer.decode(player._following(step, ended=True))


def test_an_observation_is_text_that_tokenizers_take():
    world = errand("address")
    world.reset()
    said = call("set_address", number="1005", address="\ud83d")  # a lone surrogate, escaped in JSON
    assert world.step(said).observation == '"order 1005 goes to ?"'


def test_the_user_says_more_only_when_asked_or_when_it_is_wrong():
    world = errand("cancel")
    assert "Grace" not in world.reset()
    assert world.step("How may I help you?").observation == "I do not know."
    assert world.step("Who are you?").observation == "I am Grace."
    wrong = [world.step("It is cancelled.") for _ in range(3)]
    assert [step.verdict for step in wrong] == ["wrong answer"] * 3
    assert wrong[0].observation.startswith("It is still not cancelled")
    assert wrong[1].observation == wrong[2].observation == "Only the lamp is to be cancelled."
    world.step(call("cancel_order", number="1005"))
    world.step(call("cancel_order", number="1004"))
    assert world.step("Both are cancelled.").reward == 0  # the clock was not to be cancelled
    assert SHOP["1004"]["status"] == "being packed"
    world.reset()
    world.step(call("cancel_order", number="1004"))
    assert world.step("Done.").reward == 1


@pytest.mark.parametrize(
    ("action", "verdict"),
    [
        ("<tool_call>{not json}</tool_call>", "syntax"),
        ("<tool_call>[1]</tool_call>", "syntax"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "syntax"),
        ('<tool_call>{"name": ["get_order"]}</tool_call>', "name"),
        (call("fly"), "name"),
        (call("get_order", number="9"), "name"),
        (call("get_order"), "type"),
        (call("get_order", number="1001", colour="red"), "type"),
        ("", "no answer"),
        (call("find_orders", customer="Ada"), "unfinished"),
        ("What is your name?", "asked"),
    ],
)
def test_mistakes_have_names(action, verdict):
    assert failure(run_episode(errand("status"), scripted(action), max_turns=1)) == verdict


def test_calls_are_those_of_our_chat_data(chat_tokenizer):
    function = {"name": "get_order", "arguments": '{"number": "1001"}'}
    turns = [
        {"role": "user", "content": "Where is order 1001?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "in transit"},
        {"role": "assistant", "content": "On its way."},
    ]
    ids, mask = encode_chat(chat_tokenizer, openai({"messages": turns}))
    trained = chat_tokenizer.decode([index for index, flag in zip(ids, mask, strict=True) if flag])
    world = errand("status")
    world.reset()
    assert json.loads(world.step(trained.partition(CHATML_TOKENS[2])[0]).observation) == SHOP["1001"]
    assert ids.count(chat_tokenizer.control_tokens[CHATML_TOKENS[1]]) == 4


def test_tools_are_described_as_openai_wants_it():
    for schema in schemas():
        function = schema["function"]
        assert function["name"] in TOOLS
        assert function["description"]
        assert function["parameters"]["required"] == list(function["parameters"]["properties"])
        assert "shop" not in function["parameters"]["properties"]


def test_page(tmp_path):
    traces = [run_episode(errand("cancel"), scripted("<script>", "Done."), max_turns=2)]
    traces.append(run_episode(errand("status"), scripted("x", "Leeds"), max_turns=2))
    text = agents_page(traces, 2, "a <model>")
    assert '<td data-head="turn 1">0.0</td><td data-head="turn 2">50.0</td>' in text
    assert '<th scope="col">wrong answer</th>' in text
    assert "tools/status: solved in turn 2" in text
    assert re.findall(r'title="([^"]+)">\d+</i>', text) == ["solved in turn 2: 1", "not solved: 1"]
    assert '<br><span class="soft">I am Ada. Where is my parcel?</span>' in text
    assert "more</summary>" not in text
    assert agents_page(traces * 12, 2, "a").count("<summary>2 more</summary>") == 2
    assert "<script>&" not in text
    assert "&lt;script&gt;" in text
