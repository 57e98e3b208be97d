"""What `lemur inspect` shows."""

import html
import re

import numpy as np
import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.config import default_config, from_config_dict, replace
from lemur_jax.data.config import StageConfig
from lemur_jax.data.inspect import histogram, inspect_mixture, inspect_store
from lemur_jax.data.manifest import REJECTED, Manifest
from lemur_jax.data.mixture import open_mixture
from lemur_jax.models.presets import preset
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text.chat_template import encode_chat
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.documents import FIELDS

TALK = [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": "Ja,\nvielen Dank."}]


def described(tokenizer):
    return {
        "tokenizer_digest": tokenizer.digest,
        "added_tokens": tokenizer.added_tokens,
        "vocab_size": tokenizer.vocab_size,
    }


@pytest.fixture
def chat_store(make_store, chat_tokenizer):
    ids, mask = encode_chat(chat_tokenizer, TALK)
    return make_store([ids] * 3, [mask] * 3, name="talks/train", **described(chat_tokenizer))


@pytest.fixture
def text_store(make_store, tokenizer):
    texts = [tokenizer.encode(f"def f{n}(x): return {n}") for n in range(9)]
    documents = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in texts]
    return make_store(documents, name="code/train", **described(tokenizer))


@pytest.fixture
def config(tmp_path, chat_dir, chat_store, text_store):
    config = default_config(preset("quickstart"))
    config.tokenizer.path = str(chat_dir)
    config.data.stores = str(tmp_path)
    config.data.sequence_length = 32
    config.data.sources = {
        "code": {"share": 3.0, "packing": "concat", "max_epochs": 0.0},
        "talks": {"share": 1.0, "packing": "fit", "max_epochs": 0.0},
    }
    config.train.steps = 200
    config.train.batch_rows = 8
    return from_config_dict(config)


def test_supervised_text_is_marked(chat_store, chat_tokenizer):
    shown = inspect_store(chat_store.path, tokenizer=chat_tokenizer, samples=1)
    turns = "<|im_start|>user\nGrüße?<|im_end|>\n<|im_start|>assistant\n{+Ja,\nvielen Dank.<|im_end|>\n+}"
    assert turns in shown
    assert "\x1b" not in shown
    shown = inspect_store(chat_store.path, tokenizer=chat_tokenizer, samples=1, color=True)
    assert "\x1b[32mJa,\nvielen Dank.<|im_end|>\n\x1b[0m" in shown
    assert "{+" not in shown


def test_a_store_says_how_much_it_holds_and_shows_ids_without_a_tokenizer(chat_store, chat_tokenizer):
    ids, mask = encode_chat(chat_tokenizer, TALK)
    shown = inspect_store(chat_store.path, tokenizer=chat_tokenizer)
    assert re.search(r"documents +3\n", shown)
    assert re.search(rf"tokens +{3 * len(ids)}, uint16\n", shown)
    assert re.search(rf"supervised +{3 * sum(mask)} ", shown)
    assert shown.count("--- doc-") == 3
    shown = inspect_store(chat_store.path)
    assert f"{ids[0]} {ids[1]} {ids[2]} " in shown
    assert "tokenizer's directory" in shown


def test_every_token_of_text_but_the_first_is_supervised(text_store, tokenizer):
    shown = inspect_store(text_store.path, tokenizer=tokenizer, samples=1)
    assert "<s>{+def f0(x): return 0</s>+}" in shown


def test_the_directory_above_a_store_names_it(text_store):
    with pytest.raises(UserError, match="code is no token store but has some in it: name train as well"):
        inspect_store(text_store.path.parent)
    with pytest.raises(UserError, match="no token store but has some in it: name code/train as well"):
        inspect_store(text_store.path.parent.parent)
    with pytest.raises(UserError, match=r"tokens is none, or unfinished \(it has no manifest.json\)"):
        inspect_store(text_store.path / "tokens")


def inspect_config(config):
    tokenizer = Tokenizer.load(config.tokenizer.path)
    mixture = open_mixture(config.data, tokenizer, seed=config.seed, batch_rows=config.train.batch_rows)
    return inspect_mixture(mixture, tokenizer, config.train.steps)


def test_a_config_shows_what_it_trains_on(config):
    shown = inspect_config(config)
    assert shown.startswith("200 steps of 8 rows of 32 tokens")
    shares = dict(re.findall(r"^(code|talks) +([\d.]+)%", shown, flags=re.MULTILINE))
    # Exact to the row.
    assert float(shares["code"]) == pytest.approx(75, abs=0.3)
    assert float(shares["talks"]) == pytest.approx(25, abs=0.3)
    assert "talks: 3 rows, 0.00% padding, 3 documents longer than a row are cut" in shown
    assert "tokens wanted" in shown
    assert shown.count("--- code, row") == shown.count("--- talks, row") == 1
    rare = replace(config, {"data.sources.talks.share": 1e-4})  # not in the first batch
    assert inspect_config(rare).count("--- talks, row") == 1


def test_stages_are_shown_each_for_itself(config):
    anneal = StageConfig(step=150, shares={"code": 1.0, "talks": 1.0})
    changes = {"data.sources.talks.share": 0.0, "data.stages": {"anneal": anneal}}
    shown = inspect_config(replace(config, changes))
    assert re.search(r"^talks +0\.00% +(49\.\d|50\.\d)", shown, flags=re.MULTILINE)
    assert "start, step 0 on  anneal, step 150 on" in shown
    assert shown.count("--- talks, row") == 1  # a row of the stage that it comes in


def test_the_documents_of_a_row_are_divided(config, text_store, tokenizer):
    length = 4 * int(np.diff(text_store.offsets())[0])
    shown = inspect_config(replace(config, {"data.sequence_length": length}))
    code = shown[shown.index("--- code") : shown.index("--- talks")]
    assert "\n- - -\n" in code
    assert re.search(r"\n- - -\n<s>\{\+def f\d\(x\): return \d</s>\+\}", code)


def test_the_histogram_counts_every_length_once():
    lengths = np.array([1, 2, 3, 4, 5, 8, 9, 100])
    lines = [(int(line.split()[2]), int(line.split()[-1])) for line in histogram(lengths)]
    assert lines == [(1, 1), (2, 1), (4, 2), (8, 2), (16, 1), (32, 0), (64, 0), (128, 1)]


def test_a_page_says_the_same_and_escapes_it(make_store, chat_tokenizer, chat_dir, tmp_path):
    contents = {"user": "<script>a && b</script>", "assistant": "<i>no</i>"}
    talk = [{"role": role, "content": content} for role, content in contents.items()]
    ids, mask = encode_chat(chat_tokenizer, talk)
    store = make_store([ids], [mask], **described(chat_tokenizer))
    words = ["inspect", str(store.path), "--tokenizer", str(chat_dir), "--html", str(tmp_path / "page.html")]
    assert not main(words)
    document = (tmp_path / "page.html").read_text()
    assert "<script" not in document
    assert "\x1b" not in document
    (body,) = re.findall("<pre>(.*)</pre>", document, re.DOTALL)
    plain = inspect_store(store.path, tokenizer=chat_tokenizer).replace("{+", "").replace("+}", "")
    assert html.unescape(re.sub("<[^>]*>", "", body)) == plain
    supervised = re.findall('<span class="supervised">(.*?)</span>', body, re.DOTALL)
    assert supervised == [html.escape("<i>no</i><|im_end|>\n")]


def test_the_first_token_of_a_rejected_answer_is_no_target(make_store):
    store = make_store([[7, 8, 9, 7, 8, 5]], [[0, 1, 1, REJECTED, 1, 1]], preferences=True)
    assert store.manifest.supervised_tokens == 4
    assert "7 {+8 9 +}7 {+8 5 +}" in inspect_store(store.path)


def test_names_of_documents_do_not_command_the_terminal(tmp_path):
    with StoreWriter(tmp_path / "s", Manifest(**FIELDS)) as writer:
        writer.add([1, 2, 3], id="\x1b[2J\r", n_bytes=3)
    shown = inspect_store(tmp_path / "s")
    assert "--- \\x1b[2J\\r, 3 tokens" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "x", "--samples", "-1"], "--samples is -1: it must be 0 or more"),
        (["prepare", "--config", "{}", "--runner-options", "x"], "name it with --runner"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, capsys, words, message):
    (tmp_path / "config.py").write_text(
        "from lemur_jax.config import default_config\n"
        "from lemur_jax.models.presets import preset\n"
        "get_config = lambda: default_config(preset('tiny'))\n"
    )
    assert main([word.format(tmp_path / "config.py") for word in words]) == 2
    assert message in capsys.readouterr().err


def test_options_of_a_runner_are_words_of_a_shell(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--config", "x", "--runner", "y", "--runner-options", "'"])
    assert """--runner-options: invalid split value: "'\"""" in capsys.readouterr().err
