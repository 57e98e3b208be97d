"""seqio mixtures as sources, beside seqio's own mixing."""

import functools
import json

import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.config import default_config, from_config_dict, load, replace
from lemur_jax.data.config import SourceConfig
from lemur_jax.data.mixture import open_mixture
from lemur_jax.models.presets import preset
from lemur_jax.prepare.mixtures import resolve_mixture
from lemur_jax.sweep.runs import plan_runs
from tests.helpers.list_source import function_source, run

# After list_source, which keeps TensorFlow quiet.
import seqio  # isort: skip
import tensorflow as tf  # isort: skip

SIZES = {"m_books": 25, "m_code": 81, "m_web": 400}


@pytest.fixture
def registered():
    """registered(name, rates) adds a mixture; the tasks of SIZES, as T5X users write them, are there."""
    vocabulary = seqio.PassThroughVocabulary(0)
    string = seqio.Feature(vocabulary, add_eos=False, dtype=tf.string, rank=0)
    for name, size in SIZES.items():
        values = {
            "id": [f"{name}-{index}" for index in range(size)],
            "text": [f"{name} number {index}. " * (1 + index % 5) for index in range(size)],
        }
        documents = function_source(values, num_input_examples={"train": size})
        seqio.TaskRegistry.add(name, source=documents, output_features={"text": string, "id": string})
    return seqio.MixtureRegistry.add


def with_mixture(config, name):
    return replace(config, {"data.mixture": name})


def test_a_mixture_has_seqios_documents_in_exact_shares_of_tokens(registered, make_config, tokenizer):
    by_size = functools.partial(seqio.mixing_rate_num_examples, temperature=2.0, maximum=100)
    registered("m_inner", [("m_code", by_size), ("m_web", by_size)])  # 9 and 10
    registered("m_outer", [("m_inner", 2.0), ("m_books", lambda task: 3.0), ("m_web", 0.5)])
    rates = {"m_books": 3.0, "m_code": 2.0 * 9 / 19, "m_web": 2.0 * 10 / 19 + 0.5}
    config = with_mixture(make_config(), "m_outer")
    run(config)
    # Training reads what was recorded.
    recorded = json.loads(config.data.mixture_record.read_text())
    assert {name: each["share"] for name, each in recorded.items()} == pytest.approx(rates)
    mixture = open_mixture(make_config(**{"data.sources": recorded}).data, tokenizer, seed=0, batch_rows=16)
    names = [each.name for each in mixture.sources]
    ids = np.array([mixture.locate(step)[0] for step in range(200)])
    tokens = np.array([each.rows.tokens_per_row for each in mixture.sources])
    for window in (ids[:20], ids[77:177], ids):  # to within two rows, whatever the window
        found = np.array([(window == index).sum() for index in range(3)])
        exact = np.array([rates[name] for name in names]) / tokens
        assert np.abs(found - window.size * exact / exact.sum()).max() <= 2
    ours = {document for step in range(200) for document in mixture.documents(step)}
    theirs = seqio.get_mixture_or_task("m_outer").get_dataset(None, split="train", shuffle=False)
    drawn = [example["id"].decode() for example in theirs.take(4000).as_numpy_iterator()]
    assert {document.partition("/")[2] for document in ours} == set(drawn)
    # seqio draws examples at random: its shares are those of examples, and vary.
    for name, rate in rates.items():
        share = sum(each.startswith(name) for each in drawn) / len(drawn)
        assert share == pytest.approx(rate / sum(rates.values()), abs=0.03)


CONFIG = """
from lemur_jax.config import default_config
from lemur_jax.models.presets import preset

def get_config():
    config = default_config(preset("quickstart"))
    config.tokenizer.path = {tokenizer!r}
    config.data.stores = {stores!r}
    config.data.sequence_length = 32
    config.data.mixture = "m_both"
    config.data.stages = {{"late": {{"step": 5, "shares": {{"m_books": 1.0}}}}}}
    config.prepare.workers = 1
    config.train.steps = 10
    config.train.batch_rows = 4
    return config
"""


def test_load_finds_the_sources_that_prepare_recorded(registered, tmp_path, tokenizer_dir, tokenizer):
    registered("m_both", [("m_books", 1.0), ("m_code", 3.0)])
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(tokenizer=str(tokenizer_dir), stores=str(tmp_path / "stores")))
    before = load(str(path))
    with pytest.raises(UserError, match=r"m_both.mixture.json is not there: run `lemur prepare`"):
        open_mixture(before.data, tokenizer, seed=0, batch_rows=4)
    run(before)
    after = load(str(path))
    assert {name: each.share for name, each in after.data.sources.items()} == {"m_books": 1.0, "m_code": 3.0}
    open_mixture(after.data, tokenizer, seed=0, batch_rows=4)
    # Other rates count from the next `prepare` on, which asks seqio again.
    seqio.MixtureRegistry.remove("m_both")
    seqio.MixtureRegistry.add("m_both", [("m_books", 1.0), ("m_code", 5.0)])
    assert all("unchanged" in line for line in run(after)[:2])
    assert load(str(path)).data.sources["m_code"].share == 5.0


def test_a_mixture_and_sources_are_refused_together():
    config = default_config(preset("tiny"))
    config.data.mixture, config.data.sources = "m", {"code": {"share": 1.0}}
    with pytest.raises(UserError, match=r"data.mixture is 'm' and config.data.sources has code: set one"):
        from_config_dict(config)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (lambda task: 1 / 0, "'m_books' in the seqio mixture 'm_bad' cannot be computed: ZeroDivisionError"),
        (lambda task: -1.0, "'m_books' in the seqio mixture 'm_bad' is -1.0: it must be above 0"),
        (0.0, "'m_books' in the seqio mixture 'm_bad' is 0.0: it must be above 0"),
        (lambda task: float("nan"), "is nan: it must be above 0"),
    ],
)
def test_impossible_rates_are_one_line(registered, make_config, rate, message):
    registered("m_bad", [("m_books", rate), ("m_code", 1.0)])
    with pytest.raises(UserError, match=message):
        run(with_mixture(make_config(), "m_bad"))


def test_conversations_are_packed_whole_and_a_sweep_wants_sources(registered, make_config, task):
    task([{"messages": "[]", "id": "1"}])
    registered("m_chat", [("made_up", 1)])
    config = with_mixture(make_config(), "m_chat")
    assert resolve_mixture(config.data).sources == {"made_up": SourceConfig(share=1.0, packing="fit")}
    with pytest.raises(UserError, match="data.mixture is 'm_chat': a sweep varies shares"):
        plan_runs(config, ["1"], 1, [], "")


def test_an_unknown_mixture_names_the_nearest(registered, make_config):
    registered("m_known", [("m_books", 1.0)])
    with pytest.raises(UserError, match=r"no seqio mixture 'm_know'; did you mean 'm_known'"):
        run(with_mixture(make_config(), "m_know"))


def test_a_task_of_unknown_size_and_one_of_tokens_are_refused_with_the_reason(registered, make_config, task):
    task([{"text": "a", "id": "1"}])
    registered("m_unknown", [("made_up", seqio.mixing_rate_num_examples)])
    with pytest.raises(UserError, match="does not know how many examples the task has"):
        run(with_mixture(make_config(), "m_unknown"))
    seqio.TaskRegistry.add(
        "m_t5x",
        source=function_source({"inputs": ["a"], "targets": ["b"]}),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={name: seqio.Feature(seqio.ByteVocabulary()) for name in ("inputs", "targets")},
    )
    registered("m_tokens", [("m_t5x", 1.0)])
    with pytest.raises(UserError, match=r"'m_t5x' gives tokens of its own vocabulary \(inputs, targets\)"):
        run(with_mixture(make_config(), "m_tokens"))
