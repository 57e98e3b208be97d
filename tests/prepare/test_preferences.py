"""Preferences from published rows to packed segments."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.data.config import DataConfig
from lemur_jax.data.manifest import REJECTED, Manifest
from lemur_jax.data.mixture import Source, open_rows
from lemur_jax.data.rows import ConcatRows, FitRows
from lemur_jax.prepare.cleaning import parse_steps
from lemur_jax.prepare.encoding import BadRecord, encode
from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.files import Files
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text import conversation_formats
from lemur_jax.text.chat_template import encode_chat
from lemur_jax.train.inputs import check_preferences

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (
    ("user", "Sky?"), ("assistant", "Blue."), ("assistant", "Green, and so on.")))  # fmt: skip
PAIR = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green, and so on."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "Sky?"}],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": BAD,
        },
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Sky?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0},
    ],
)
def test_trl_and_ultrafeedback_rows(row):
    assert conversation_formats.preference(row) == PAIR


def test_shared_turns_are_not_trained_on():
    turns = [USER, GOOD, USER]
    pair = conversation_formats.preference({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]})
    assert [turn.get("train", True) for turn in pair["rejected"]] == [True, False, True, True]
    # An answer that the other conversation begins with is trained on.
    pair = conversation_formats.preference({"chosen": [USER, GOOD], "rejected": [*turns, BAD]})
    assert pair == {"chosen": [USER, GOOD], "rejected": [*turns, BAD]}


HH = "\n\nHuman: Sky?\n\nAssistant: Blue.\n\nHuman: By night?\nSay it.\n\nAssistant: "


def test_transcripts_of_anthropic():
    pair = conversation_formats.anthropic_hh({"chosen": f"{HH}Dark.", "rejected": f"{HH} Pink.\n\nStill. "})
    last = {"role": "user", "content": "By night?\nSay it."}
    prompt = [USER, GOOD | {"train": False}, last]
    assert pair["chosen"] == [*prompt, {"role": "assistant", "content": "Dark."}]
    assert pair["rejected"] == [*prompt, {"role": "assistant", "content": "Pink.\n\nStill."}]
    with pytest.raises(ValueError, match="begins with 'Sky"):
        conversation_formats.anthropic_hh({"chosen": "Sky?\n\nAssistant: Blue.", "rejected": f"{HH}Pink."})
    with pytest.raises(ValueError, match="begins with .*role.*, not with 'Human:'"):
        conversation_formats.anthropic_hh(PAIR)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"{HH}Dark.", "rejected": f"{HH}Pink."},
        {"chosen": [GOOD], "rejected": [BAD], "question": "Sky?"},
        {"chosen": [USER, GOOD], "rejected": BAD["content"]},
        {"messages": [USER, GOOD], "chosen": GOOD, "rejected": BAD},
    ],
)
def test_answers_to_nothing_are_refused(row):
    with pytest.raises(ValueError, match="answer nothing: the row needs|the prompt ends with an answer"):
        conversation_formats.preference(row)


def test_scores_and_labels():
    scored = [{"response": each["content"], "overall_score": n} for each, n in ((GOOD, 9), (BAD, 2))]
    assert conversation_formats.ultrafeedback({"instruction": "Sky?", "completions": scored}) == PAIR
    with pytest.raises(ValueError, match="different scores"):
        conversation_formats.ultrafeedback({"instruction": "Sky?", "completions": scored[:1] * 2})
    row = {"prompt": "Sky?", "completion": BAD["content"], "label": False}
    labelled = conversation_formats.labelled
    assert labelled(row) == {"rejected": [USER, BAD]}
    assert labelled({"messages": [USER, GOOD], "label": True}) == {"chosen": [USER, GOOD]}
    with pytest.raises(ValueError, match="field 'prompt' has no turns"):
        labelled({"messages": [GOOD], "label": True})
    with pytest.raises(ValueError, match="label is 'False', neither true nor false"):
        labelled(row | {"label": "False"})
    scored.append({"response": "Red.", "overall_score": "nan"})
    with pytest.raises(ValueError, match="overall_score is NaN"):
        conversation_formats.ultrafeedback({"instruction": "Sky?", "completions": scored})


def test_pairs_are_read_from_parquet(tmp_path):
    row = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green, and so on."}
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    files = Files(patterns={"train": path}, fields=Fields(preferences=conversation_formats.preference))
    (document,) = files.documents("train", [path])
    assert (json.loads(document["preferences"]), document["error"]) == (PAIR, b"")


@pytest.fixture
def data(chat_tokenizer, tmp_path):
    """A config of data with a store of a pair, an undesirable and a desirable conversation."""
    records = [PAIR, {"rejected": PAIR["rejected"]}, {"chosen": PAIR["chosen"]}]
    manifest = Manifest(
        task="pairs", split="train", source="pairs", tokenizer_digest=chat_tokenizer.digest,
        added_tokens=chat_tokenizer.added_tokens, vocab_size=chat_tokenizer.vocab_size, has_loss_mask=True,
        preferences=True,
    )  # fmt: skip
    with StoreWriter(tmp_path / "pairs" / "train", manifest) as writer:
        for record in records:
            found = encode(chat_tokenizer, {"preferences": json.dumps(record).encode()})
            writer.add(found.tokens, found.id, found.n_bytes, found.mask)
    return DataConfig(stores=str(tmp_path), sequence_length=256)


def test_conversations_are_segments_by_document_and_side(data, chat_tokenizer):
    batch = {
        key: each[0]
        for key, each in open_rows(data, chat_tokenizer, "pairs", "train").read(np.array([0])).items()
    }
    assert np.unique(batch["segment_ids"]).tolist() == [0, 2, 3, 5, 6]
    for segment, side in ((2, "chosen"), (3, "rejected"), (5, "rejected"), (6, "chosen")):
        here = batch["segment_ids"] == segment
        ids, mask = encode_chat(chat_tokenizer, PAIR[side])
        assert batch["tokens"][here].tolist() == ids
        assert batch["targets"][here].tolist() == [*ids[1:], 0]
        assert batch["loss_weights"][here].tolist() == [*mask[1:], 0]
        assert batch["positions"][here].tolist() == list(range(len(ids)))


def test_what_cannot_be_used_is_said(data, chat_tokenizer):
    with pytest.raises(UserError, match="must be 'fit'"):
        open_rows(data, chat_tokenizer, "pairs", "train", "concat")
    same = json.dumps({"chosen": PAIR["chosen"], "rejected": PAIR["chosen"]}).encode()
    for content in (same, b"{}", b"[]"):
        assert isinstance(encode(chat_tokenizer, {"preferences": content}), BadRecord)


@pytest.mark.parametrize("step", ["exact_duplicates", "near_duplicates"])
def test_what_is_chosen_here_and_rejected_there_is_no_duplicate(chat_tokenizer, step):
    swapped = {"rejected": PAIR["chosen"], "chosen": PAIR["rejected"]}
    records = [PAIR, swapped, {"chosen": PAIR["chosen"]}, {"rejected": PAIR["chosen"]}]
    found = [
        encode(chat_tokenizer, {"preferences": json.dumps(record).encode()}, parse_steps("t", {step: {}}))
        for record in [*records, *records]
    ]
    assert len({tuple(each.fingerprints.values()) for each in found}) == len(records)


def test_a_loss_that_does_not_fit_the_data_is_refused(data, chat_tokenizer, make_store):
    def check(loss, rows):
        check_preferences(loss, [Source(name="x", rows=rows, share=1.0)])

    pairs = open_rows(data, chat_tokenizer, "pairs", "train")
    one_sided = make_store([[1] * 4] * 2, [[0, 1, 1, 1], [REJECTED, 0, 1, 1]], preferences=True)
    labelled, text = FitRows(one_sided, 8), ConcatRows(make_store([[1] * 4], name="b/train"), 8)
    for loss, rows in (("dpo", pairs), ("kto", pairs), ("kto", labelled), ("", text)):
        check(loss, rows)
    for loss, rows, message in (
        ("", pairs, "has preferences: name a loss"),
        ("orpo", labelled, "no pairs of a chosen and a rejected"),
        ("kto", text, "has no preferences"),
    ):
        with pytest.raises(UserError, match=message):
            check(loss, rows)
