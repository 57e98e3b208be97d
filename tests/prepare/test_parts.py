"""Parts of a task by label: counts, order and content against the records themselves."""

import json

import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.config import replace
from lemur_jax.data.inspect import inspect_store
from lemur_jax.data.manifest import Manifest, read_manifest
from lemur_jax.data.mixture import open_mixture
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare import parts, store_writer
from lemur_jax.prepare.parts import copy_part
from lemur_jax.prepare.store_writer import StoreWriter
from tests.helpers.documents import FIELDS
from tests.helpers.list_source import files_of, run

LANGUAGES = ("Python", "C++", "Go")


@pytest.fixture
def labelled(tmp_path, random_documents):
    """A store of 200 documents whose language is drawn, and the documents and languages."""
    documents = random_documents(200, 60)
    rng = np.random.default_rng(3)
    languages = rng.choice([*LANGUAGES, ""], 200).tolist()
    masks = [rng.integers(0, 2, len(ids)) for ids in documents]
    manifest = Manifest(**FIELDS, has_loss_mask=True, label_field="lang")
    with StoreWriter(tmp_path / "t/train", manifest) as writer:
        for index, (ids, mask, language) in enumerate(zip(documents, masks, languages, strict=True)):
            writer.add(ids, f"doc-{index}", 7 * len(ids), mask, language)
    return TokenStore.open(tmp_path / "t/train"), documents, masks, languages


@pytest.mark.parametrize("copied", [1, 64, 1 << 16])
def test_a_part_holds_the_documents_of_its_label_in_order(labelled, tmp_path, monkeypatch, copied):
    whole, documents, masks, languages = labelled
    monkeypatch.setattr(parts, "_COPIED", copied)
    for language in LANGUAGES:
        with StoreWriter(tmp_path / "part", Manifest(**FIELDS, has_loss_mask=True)) as writer:
            copy_part(whole, language, writer)
        part = TokenStore.open(tmp_path / "part")
        expected = [index for index, each in enumerate(languages) if each == language]
        assert part.document_ids(np.arange(part.num_documents)) == [f"doc-{index}" for index in expected]
        for place, index in enumerate(expected):
            ids, mask = part.document(place)
            np.testing.assert_array_equal(ids, documents[index])
            np.testing.assert_array_equal(mask, masks[index])
        assert part.manifest.bytes == 7 * part.manifest.tokens == whole.manifest.labels[language]["bytes"]
        assert part.manifest.supervised_tokens == sum(int(masks[index][1:].sum()) for index in expected)


def test_labels_are_counted_shown_and_part_of_the_digest(labelled):
    whole, _, _, languages = labelled
    for language in LANGUAGES:
        assert whole.manifest.labels[language]["documents"] == languages.count(language)
    assert f"C++ {languages.count('C++')}" in inspect_store(whole.path)
    assert f"(none) {languages.count('')}" in inspect_store(whole.path)
    assert "label_field" in json.loads((whole.path / "manifest.json").read_text())


def test_a_field_that_differs_in_each_document_is_no_label(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "MAX_LABELS", 10)
    with StoreWriter(tmp_path / "s", Manifest(**FIELDS, label_field="lang")) as writer:
        for index in range(10):
            writer.add([1], "x", 1, label=str(index))
        with pytest.raises(UserError, match="'lang' of the task t has more than 10 values"):
            writer.add([1], "x", 1, label="10")


def test_a_writer_that_goes_on_knows_its_labels(tmp_path):
    def write(first, stop):
        with StoreWriter(tmp_path / "s", Manifest(**FIELDS, label_field="lang")) as writer:
            for index in range(first, stop):
                if index == 20 and first == 0:
                    writer.save({"at": 20})
                if index == 25 and first == 0:
                    raise KeyboardInterrupt
                writer.add([index], f"d{index}", 1, label=LANGUAGES[index % 3])

    with pytest.raises(KeyboardInterrupt):
        write(0, 40)
    write(20, 40)
    whole = TokenStore.open(tmp_path / "s")
    for number, language in enumerate(LANGUAGES):
        assert whole.documents_of(language, 0, 99).tolist() == list(range(number, 40, 3))


def records(count):
    for index in range(count):
        language = LANGUAGES[index % 7 % 3]
        text = f"// {language}\nint f{index}() {{ return {index}; }}\n" * (1 + index % 3)
        yield {"text": text, "id": f"doc-{index}", "meta": json.dumps({"lang": language})}


def test_parts_are_sources_with_exact_shares(task, make_config, tokenizer):
    task(records(300), validation=records(40))
    config = make_config(
        "made_up/Python", "made_up/C++", held_out=["made_up/Go"],
        **{"prepare.steps": {"made_up": {"label": {"field": "lang"}}}},
    )  # fmt: skip
    config = replace(config, {"data.sources.made_up/Python.share": 3.0})
    said = run(config)
    assert [line.partition(":")[0] for line in said[:5]] == [
        "made_up/train",
        "made_up/C++/train",
        "made_up/train",
        "made_up/Python/train",
        "made_up/validation",
    ]
    assert said[2].endswith("unchanged")
    mixture = open_mixture(config.data, tokenizer, seed=config.seed, batch_rows=config.train.batch_rows)
    names = [source.name for source in mixture.sources]
    ids = np.concatenate([mixture.locate(step)[0] for step in range(500)])
    tokens = [(ids == n).sum() * source.rows.tokens_per_row for n, source in enumerate(mixture.sources)]
    assert tokens[names.index("made_up/Python")] / sum(tokens) == pytest.approx(0.75, abs=0.002)
    expected = [r["id"] for r in records(300) if "Python" in r["meta"]]
    python = mixture.sources[names.index("made_up/Python")].rows.store
    assert python.document_ids(np.arange(python.num_documents)) == expected
    # Each part can be scored by itself, with the bytes of its own texts.
    held_out = read_manifest(f"{config.data.stores}/made_up/Go/validation")
    assert held_out.bytes == sum(len(r["text"].encode()) for r in records(40) if "Go" in r["meta"])
    # Nothing is made twice, and a part does not need the whole store any more.
    assert all("unchanged" in line for line in run(config)[:3])


@pytest.mark.parametrize(
    ("sources", "steps", "message"),
    [
        (["made_up/Python"], {}, r"prepare\.steps\.made_up has no step `label`"),
        (["made_up/Python", "made_up"], {"field": "lang"}, r"names made_up and its part made_up/Python"),
        (["made_up/train"], {"field": "lang"}, r"called like a split"),
        (["made_upp/Python"], {"field": "lang"}, r"'made_upp'; did you mean 'made_up'"),
    ],
)
def test_a_bad_part_is_one_line_before_anything_is_made(task, make_config, tmp_path, sources, steps, message):
    task(records(10))
    config = make_config(*sources, **{"prepare.steps": {"made_up": {"label": steps}} if steps else {}})
    with pytest.raises(UserError, match=message):
        run(config)
    assert not (tmp_path / "stores").exists()


def test_a_part_does_not_replace_the_store_of_its_task(task, make_config, tmp_path):
    task(records(10))
    run(make_config("made_up"))
    before = files_of(tmp_path / "stores")
    config = make_config("made_up/Go", **{"prepare.steps": {"made_up": {"label": {"field": "lang"}}}})
    with pytest.raises(UserError, match=r"made_up/train was made before the definition, .* add --replace"):
        run(config)
    assert files_of(tmp_path / "stores") == before
    assert len(run(config, replace=True)) == 3


def test_a_part_that_is_not_there_is_one_line(task, make_config):
    task(records(10))
    config = make_config("made_up/Rust", **{"prepare.steps": {"made_up": {"label": {"field": "lang"}}}})
    with pytest.raises(UserError, match=r"made_up has no document with lang = 'Rust'.*C\+\+ \d"):
        run(config)
