"""lm-evaluation-harness over our model on 8 devices, against its own `hf` model on the export."""

import json

import numpy as np
import pytest

from lemur_jax.common.errors import UserError

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate: pip install '.[eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lemur_jax.evals import benchmarks
from lemur_jax.evals.harness import LemurLM
from lemur_jax.infer import score as scoring
from lemur_jax.text.files import CHATML_TEMPLATE

HEAD = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: ["A", "B", "a longer answer"]
doc_to_target: 1
metric_list: [{metric: acc}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["e"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


def write_task(path, name, text, documents=({"question": "x"},)):
    """A task's file and its documents."""
    (path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    head = HEAD.replace("NAME", name).replace("DATA", str(path / "data.jsonl"))
    (path / f"{name}.yaml").write_text(head + text)


@pytest.fixture(scope="module")
def ours(chat_model):
    return LemurLM(checkpoint=chat_model, mesh="fsdp=4,tensor=2", batch_tokens=1024)


@pytest.fixture(scope="module")
def theirs(chat_model_export):
    # Its cache of logits gives windows of repetitive text each other's continuations.
    options = {"dtype": "float32", "add_bos_token": False, "device": "cpu", "logits_cache": False}
    return HFLM(pretrained=str(chat_model_export), batch_size=4, **options)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": f"def f{i}(x):" + " return x + 1" * (2 * i), "text": f"text {i} é\n" * (15 * i + 1)}
        for i in range(4)
    ]
    for name, text in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        write_task(path, f"local_{name}", text, documents)
    return TaskManager(include_path=str(path), include_defaults=False)


def samples(model, tasks, **options):
    """Raw responses by task and document."""
    names = ["local_choice", "local_generate", "local_rolling"]
    options |= {"model": model, "tasks": names, "task_manager": tasks}
    found = simple_evaluate(**options, bootstrap_iters=0)["samples"]
    order = {name: sorted(items, key=lambda item: item["doc_id"]) for name, items in found.items()}
    return {name: [item["resps"] for item in items] for name, items in order.items()}


@pytest.mark.parametrize("chat", [False, True])
def test_local_tasks_give_what_the_harness_gives(ours, theirs, tasks, chat):
    got, expected = (samples(model, tasks, apply_chat_template=chat) for model in (ours, theirs))
    assert got["local_generate"] == expected["local_generate"]
    assert any(answer[0][0] for answer in got["local_generate"])
    for mine, his in zip(got["local_choice"], expected["local_choice"], strict=True):
        assert [r[0][1] for r in mine] == [r[0][1] for r in his]
        np.testing.assert_allclose([r[0][0] for r in mine], [r[0][0] for r in his], atol=1e-3)
    mine, his = ([float(r[0][0]) for r in found["local_rolling"]] for found in (got, expected))
    np.testing.assert_allclose(mine, his, atol=1e-3)


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_edges(ours, theirs, monkeypatch):
    """An empty context, one too long, trailing spaces, control tokens, options of one token; logits in parts."""
    monkeypatch.setattr(scoring, "LOGIT_POSITIONS", 32)
    scoring._score.clear_cache()
    chat = ours.apply_chat_template([{"role": "user", "content": " hello "}])
    assert chat == theirs.apply_chat_template([{"role": "user", "content": " hello "}])
    requests = instances(
        "loglikelihood",
        ("", "hello there"), ("word " * 200, "the end"), ("in front  ", " of"), (chat, "An answer"),
        ("x", " A"), ("x", " B"), ("x", "<|im_end|>"),
    )  # fmt: skip
    got, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_few_requests_are_few_shapes_and_many_are_hardly_padded(ours):
    def batches(count, most, batch_tokens=1024):
        lengths = [1 + index * 7919 % most for index in range(count)]
        rows = [scoring._Row(tuple(range(n)), min(n, 1 + n % 3), [0], [0]) for n in lengths]
        found = list(scoring._batches(ours.session, rows, batch_tokens))
        assert sorted(len(row.tokens) for rows, *_ in found for row in rows) == sorted(lengths)
        for rows, T, P, B in found:
            assert len(rows) <= B
            assert B % 4 == 0
            assert batch_tokens >= B * T
            assert max(len(row.tokens) for row in rows) <= T
            assert max(row.asked for row in rows) <= P
        return found, sum(lengths)

    found, _ = batches(20, 120)
    assert {P for *_, P, _ in found} == {16}
    assert len({tuple(shape) for _, *shape in found}) == 1
    # A second batch is about as full as the first, which could have held 64.
    assert [(len(rows), B) for rows, *_, B in batches(72, 120, 8192)[0]] == [(40, 40), (32, 40)]
    found, total = batches(3000, 120)
    assert {P for *_, P, _ in found} == {1, 16}
    assert sum(B * T for _, T, _, B in found) < 1.35 * total


def test_a_prefilled_answer_is_left_open(ours, theirs):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]
    text = ours.apply_chat_template(turns, add_generation_prompt=False)
    assert text.endswith("assistant\nThe answer is")
    assert text == theirs.apply_chat_template(turns, add_generation_prompt=False)


def test_a_template_without_system_turns_leaves_a_description_out(ours, theirs, monkeypatch, caplog):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = refuses + CHATML_TEMPLATE
    for model in (ours, theirs):
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    text = ours.apply_chat_template(turns)
    assert "user\n1 + 1" in text
    assert text == theirs.apply_chat_template(turns) == ours.apply_chat_template(turns)
    assert sum("left out" in each for each in caplog.messages) == 1
    monkeypatch.setattr(ours.tokenizer, "chat_template", "{{ raise_exception('no turn') }}")
    with pytest.raises(UserError, match="no turn"):
        ours.apply_chat_template(turns)


def test_bos_only_where_it_is_wanted(ours):
    with_bos = LemurLM(ours.session, add_bos=True)
    assert with_bos.tok_encode("a b") == [1, *ours.tok_encode("a b")]
    assert with_bos.tok_encode("<s>a b") == [1, *ours.tokenizer.encode("a b", prefix=False)]


def test_weights_reach_the_session(chat_model):
    with pytest.raises(UserError, match="unknown weights 'int3'"):
        LemurLM(checkpoint=chat_model, weights="int3")


def test_filters_of_a_task_are_used_and_beams_refused(ours):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}

    def answer(text="x", **more):
        return ours.generate_until(instances("generate_until", (text, options | more)))

    free, greedy = answer(), answer(do_sample=False)
    assert free != greedy
    for filtered in ({"min_p": 1.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.0}):
        assert answer(**filtered) == greedy
    nothing = {"min_p": None, "top_p": None, "top_k": None, "repetition_penalty": None, "num_beams": 1}
    assert answer(**nothing) == free
    assert answer("") != free
    for wish, message in (({"num_beams": 4}, "num_beams 4"), ({"max_gen_toks": 150}, "150 new tokens")):
        with pytest.raises(UserError, match=f"wants {message}"):
            answer(**wish)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("{{question}}", "{{nothing}}", "'nothing' is undefined"),
        ("test_split: test", "test_split: none", "KeyError: 'none'"),
        ("doc_to_target: 1", "doc_to_target: 9", "IndexError"),
        ("test_split: test", "test_split: test\nunsafe_code: true", "runs answers outside the sandbox"),
    ],
)
def test_a_task_whose_file_does_not_fit_its_data_is_one_line(ours, tmp_path, old, new, reason):
    write_task(tmp_path, "local_bad", CHOICE)
    file = tmp_path / "local_bad.yaml"
    file.write_text(file.read_text().replace(old, new))
    options = benchmarks.Options(include_path=str(tmp_path))
    with pytest.raises(UserError, match=f"'local_bad' .*{reason}"):
        list(benchmarks.evaluate(ours.session, ["local_bad"], options))
    with pytest.raises(UserError, match=r"--include-path nowhere is no directory"):
        benchmarks.check_tasks(["local_bad"], benchmarks.Options(include_path="nowhere"))


def test_an_answer_longer_than_the_model(ours):
    longest = ours.max_length
    (last,) = ours._loglikelihood_tokens([(None, [5], [6] * longest)])
    assert last[0] < 0
    with pytest.raises(UserError, match=f"has {longest + 1} tokens, .* are {longest}: leave the task out"):
        ours._loglikelihood_tokens([(None, [5], [6] * (longest + 1))])


def test_a_tag_and_a_group_without_a_mean_give_the_numbers_of_their_parts(ours, tmp_path):
    for name in ("local_one", "local_two"):
        write_task(tmp_path, name, f"tag: local_tag\n{CHOICE}")
    parts = "task: [local_one, local_two]\n"
    (tmp_path / "group.yaml").write_text(f"group: local_group\n{parts}")
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "mean.yaml").write_text(f"group: local_mean\n{parts}{mean}")
    names = ["local_tag", "local_group", "local_mean", "local_one"]
    options = benchmarks.Options(include_path=str(tmp_path))
    found = [one.detail["metrics"] for one in benchmarks.evaluate(ours.session, names, options)]
    assert found[0] == found[1]
    assert {"local_one acc,none", "local_two acc,none"} <= found[0].keys()
    assert found[2]["acc,none"] == found[3]["acc,none"] == found[0]["local_one acc,none"]


def test_a_task_of_the_hub_without_a_network_is_one_line_at_once(ours, tmp_path, monkeypatch, caplog):
    import datasets
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    head = "task: on_the_hub\ndataset_path: nobody/nothing\ntest_split: test"
    (tmp_path / "task.yaml").write_text(head + CHOICE)
    options = benchmarks.Options(include_path=str(tmp_path))
    with pytest.raises(
        UserError, match="'on_the_hub': its data set is not in the cache and the hub cannot be"
    ):
        list(benchmarks.evaluate(ours.session, ["on_the_hub"], options))
    assert not constants.HF_HUB_OFFLINE
    assert "Retrying" not in caplog.text
