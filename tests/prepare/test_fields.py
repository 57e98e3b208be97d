"""Which rows are one document, and which documents are held out."""

import json
from pathlib import Path

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.prepare import fields as field_maps
from lemur_jax.prepare.cleaning import filters, parse_steps
from lemur_jax.prepare.encoding import read_content
from lemur_jax.prepare.fields import Fields, gather, is_held_out, to_documents
from lemur_jax.prepare.readers import BadRow
from lemur_jax.text.conversation_formats import evol_code_alpaca


def test_held_out_share():
    chosen = sum(is_held_out(str(n).encode(), 0.1) for n in range(10_000))
    assert 900 < chosen < 1100
    assert not is_held_out(b"x", 0.0)


def test_rows_are_gathered_while_they_follow_each_other(monkeypatch):
    monkeypatch.setattr(field_maps, "MAX_GATHERED", 3)
    rows = [{"t": name, "n": n} for n, name in enumerate("aabaccccaaa")]
    bad = BadRow(reason="x")
    found = [*((f"row {n}", row) for n, row in enumerate(rows)), ("row 11", bad), ("row 12", {})]
    gathered = dict(gather(found, "t"))
    assert gathered["row 0"] == {"t": "a", "n": 0, "rows": rows[:2]}
    assert gathered["row 3"] == {"t": "a", "n": 3, "rows": rows[3:4]}
    assert gathered["row 8"]["rows"] == rows[8:]
    assert gathered["row 4"] == BadRow(reason="4 rows have one 't', more than 3", records=4)
    assert gathered["row 11"] == bad
    assert gathered["row 12"] == BadRow(reason="no field 't', or it is empty")
    assert len(gathered) == 7
    with pytest.raises(UserError, match=r"gather='t'\) would keep the text of each document's first row"):
        Fields(gather="t")
    with pytest.raises(UserError, match=r"meta='lang'\) is a string: write a tuple, \('lang',\)"):
        Fields(meta="lang")
    with pytest.raises(UserError, match=r"Fields has messages and preferences: name one"):
        Fields(messages=_said, preferences=_judged)


def test_metadata_of_any_bytes_keeps_its_document():
    rows = [("row 0", {"text": "x", "uuid": b"\x82\xff", "names": ["é".encode()]})]
    ((document, _),) = to_documents("f", rows, Fields(meta=("uuid", "names")))
    assert document["error"] == b""
    assert json.loads(document["meta"]) == {"uuid": "\\x82\\xff", "names": ["é"]}


def test_nan_is_null_as_pandas_means_it():
    row = {"instruction": "q", "input": float("nan"), "output": "a", "system": float("nan"), "history": None}
    fields = Fields(messages=evol_code_alpaca, meta=("system", "output"))
    ((document, _),) = to_documents("f", [("row 0", row)], fields)
    assert [turn["content"] for turn in json.loads(document["messages"])] == ["q", "a"]
    assert json.loads(document["meta"]) == {"system": None, "output": "a"}  # not a label or repository "nan"


def test_a_disk_error_in_a_function_is_no_bad_record():
    fields = Fields(messages=lambda row: Path(row["path"]).read_text())
    with pytest.raises(FileNotFoundError):
        list(to_documents("f", [("row 0", {"path": "gone"})], fields))


def _first(row):
    return [next(turn for turn in row["turns"] if turn["role"] == "assistant")]


def _checked(row):
    assert row["turns"], "no turns"
    return [{"role": "assistant", "content": str(1 / len(row["turns"][0]))}]


@pytest.mark.parametrize(
    ("function", "turns", "reason"),
    [(_first, [], "StopIteration"), (_checked, [], "no turns"), (_checked, [{}], "division by zero")],
)
def test_a_row_that_a_function_cannot_use_is_a_bad_record(function, turns, reason):
    good = {"turns": [{"role": "assistant", "content": "x"}]}
    rows = [("row 0", {"turns": turns}), ("row 1", good)]
    bad, other = (document for document, _ in to_documents("f", rows, Fields(messages=function)))
    assert json.loads(bad["error"])["reason"] == reason
    assert other["error"] == b""


def _said(row):
    return [{"role": "assistant", "content": row["text"], "weight": int(row["text"][0] == "s")}]


def _judged(row):
    return {"chosen" if row["text"][0] == "s" else "rejected": _said(row)}


@pytest.mark.parametrize("space", ["\n", "\u00a0", "\u3000\n", "\x1c"])
def test_what_the_step_for_duplicates_takes_for_equal_is_held_out_together(space):
    steps = parse_steps("t", {"exact_duplicates": {}})
    rows = [(f"row {n}", {"text": text}) for n, text in enumerate(["some text", f"{space}some text{space}"])]
    for fields in (Fields(), Fields(messages=_said), Fields(preferences=_judged)):
        documents, keys = zip(*to_documents("f", rows, fields), strict=True)
        assert len(set(keys)) == 1
        if fields.preferences is None:
            texts = [read_content(document)[2] for document in documents]
            assert len({filters(steps).fingerprints({"": text})["digests"] for text in texts}) == 1


def test_a_metadata_field_that_no_row_has_is_named_once(caplog):
    fields = Fields(meta=("lang", "languge", "meta.repo"))
    rows = [("row 0", {"text": "a", "lang": None}), ("row 1", {"text": "b", "meta": '{"repo": null}'})]
    for path in "fg":
        assert len(list(to_documents(path, rows, fields))) == 2
    assert not list(to_documents("empty", [], fields))
    assert [m.split(":")[0] for m in caplog.messages] == ["no row of a file has the metadata field languge"]
