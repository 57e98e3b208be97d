"""Documents out of files, and every way in which a file can be bad."""

import bz2
import datetime
import errno
import gzip
import json
import lzma
import random
import re

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lemur_jax.prepare import readers, streams
from lemur_jax.prepare.fields import Fields, gather, to_documents
from lemur_jax.prepare.files import Files
from lemur_jax.prepare.readers import BadRow


def read(path, fields=None, kind="", **options):
    kind = kind or readers.format_of(str(path))
    fields = fields or Fields()
    return [doc for doc, _ in to_documents(str(path), readers.read_rows(str(path), kind, **options), fields)]


def good(documents, content="text"):
    return [document[content].decode() for document in documents if not document["error"]]


def bad(documents):
    """(place in the file, reason, records) of each bad one."""
    failures = [(d["where"].decode().rpartition(": ")[2], d["error"]) for d in documents if d["error"]]
    return [(where, *(json.loads(error)[key] for key in ("reason", "records"))) for where, error in failures]


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXTS = ["Grüße\r\nund 漢字", "x = 1\n" * 50_000, "  end "]


def pack(data, suffix):
    """The bytes compressed by a library that the reader does not use, where there is one."""
    if suffix in COMPRESS:
        return COMPRESS[suffix](data)
    if suffix == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as out:
            out.write(data)
        return sink.getvalue().to_pybytes()
    return data


@pytest.mark.parametrize("suffix", ["", ".zst", *COMPRESS])
def test_json_lines_plain_and_compressed(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    lines = [json.dumps({"text": text, "n": index}) for index, text in enumerate(TEXTS)]
    path.write_bytes(pack("\n\n".join(lines).encode(), suffix))  # blank lines, and none at the end
    found = read(path, Fields(id="n", meta=("n",)))
    assert good(found) == TEXTS
    assert [doc["id"] for doc in found] == [b"0", b"1", b"2"]
    assert [doc["where"].decode() for doc in found] == [f"{path}: line {n}" for n in (1, 3, 5)]
    assert json.loads(found[2]["meta"]) == {"n": 2}


def test_text_files_whole_and_by_line(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("one é \ntwo\n".encode()))
    assert good(read(path)) == ["one é \ntwo\n"]
    assert good(read(path, kind="lines")) == ["one é ", "two"]


def test_lines_that_are_bad_are_named_and_the_others_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "a"}', b'{"text": "\xff"}', b"{]", b"[1]", b'{"content": "x"}', b'{"text": 3}']
    lines += [b"[" * 99_999, b'{"text": "\\ud800"}', b'{"text": "z"}']
    path.write_bytes(b"\n".join(lines))
    found = read(path)
    assert good(found) == ["a", "z"]
    reasons = [reason for _, reason, _ in bad(found)]
    expected = ["invalid UTF-8", "not JSON", "list, not an object", "'text'; there are content", "is int"]
    for reason, part in zip(reasons, [*expected, "too deep", "invalid UTF-8"], strict=True):
        assert part in reason
    assert [where for where, _, _ in bad(found)] == [f"line {n}" for n in range(2, 9)]
    assert found[1]["text"].startswith(b'{"text": "')  # what stood there


@pytest.mark.parametrize("suffix", [".zst", *COMPRESS])
def test_a_truncated_file_gives_what_is_whole_and_counts_what_is_missing(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ", k=2000)) for _ in range(5000)]
    whole = pack("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), suffix)
    path.write_bytes(whole[: len(whole) // 2])
    found = read(path)
    count = len(good(found))
    assert 500 < count < 4500
    assert good(found) == texts[:count]
    ((where, reason, records),) = bad(found)
    assert (where, records) == (f"after line {count}", count)  # as many again: the file does not say
    assert "stream ends early" in reason


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_what_is_kept_of_a_long_line_is_its_beginning(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(streams, "_READ_BYTES", chunk)
    lines = [b'{"text": "' + bytes(range(97, 123)) * 100 + b'"}', b" " * 1000 + b'{"text": "b"}']
    path = tmp_path / "a.jsonl"
    longest = b'{"text": "' + b"x" * 988 + b'"}'
    path.write_bytes(b"\n".join([b'{"text": "before"}', *lines, longest]))
    _, *found, last = readers.read_rows(str(path), "jsonl", max_bytes=1000)
    assert last == ("line 4", {"text": "x" * 988})
    for number, (line, (place, row)) in enumerate(zip(lines, found, strict=True), 2):
        assert (place, row.excerpt) == (f"line {number}", line[: readers.EXCERPT])
        assert row.reason == "longer than 1,000 bytes"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(streams, "_READ_BYTES", 7)  # cuts characters
    mark = "\ufeff" if encoding.endswith("be") else ""  # Python writes none of these two
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("A hűvös 漢字 😀", "z")]
    for kind, text in (("jsonl", "\r\n".join(lines)), ("lines", "A hűvös 漢字 😀\r\nz")):
        (tmp_path / "a").write_bytes((mark + text).encode(encoding))
        assert good(read(tmp_path / "a", kind=kind)) == ["A hűvös 漢字 😀", "z"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('{"text": "a"}\n'.encode("utf-16-le"), "NUL bytes: UTF-16 without a byte-order mark"),
        ('{"text": "a"}\n'.encode("utf-32-be"), "NUL bytes"),
        ('{"text": "café"}\n'.encode("latin-1"), r"invalid UTF-8 \(byte 0xe9 at 13\): Latin-1"),
        ('{"text": "café"}\n'.encode("utf-16")[:-1], "invalid UTF-16, by its byte-order mark"),
        (b'{"text": "a\0"}\n', "NUL bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "lines", "text"])
def test_other_encodings_are_refused_by_name(tmp_path, kind, data, reason):
    (tmp_path / "a").write_bytes(data)
    found = bad(read(tmp_path / "a", kind=kind))
    assert found
    assert all(re.search(reason, said) for _, said, _ in found)


def test_padding_that_the_compressors_own_tools_read_is_no_damage(tmp_path):
    for suffix, compress in COMPRESS.items():
        packed = compress(b'{"text": "a"}\n')
        for padding, lost in ((bytes(100_000), suffix == ".bz2"), (b"garbage", 1)):
            (tmp_path / f"a.jsonl{suffix}").write_bytes(packed * 2 + padding)
            found = read(tmp_path / f"a.jsonl{suffix}")
            assert good(found) == ["a", "a"]
            assert len(bad(found)) == lost
        assert bad(found)[0][2] == 1  # record: few bytes follow


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_an_empty_file_is_named(tmp_path, caplog, name):
    (tmp_path / name).write_bytes(b"")
    found = bad(read(tmp_path / name))
    assert sum(count for *_, count in found) == (name != "a.jsonl")
    assert found or caplog.messages == [f"{tmp_path / name} is empty"]


def test_damage_is_weighed_by_what_follows_it(tmp_path):
    """Three quarters of a file of many zstd frames are behind the damage; a wrong checksum spares no record."""
    frames = [
        pack(json.dumps({"text": random.Random(n).randbytes(500).hex()}).encode() + b"\n", ".zst")
        for n in range(400)
    ]
    data = bytearray(b"".join(frames))
    begin = len(b"".join(frames[:100]))
    data[begin : begin + 4] = b"XXXX"
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    found = read(tmp_path / "a.jsonl.zst")
    assert len(good(found)) == 100
    ((_, reason, records),) = bad(found)
    assert "damaged zstd" in reason
    assert 280 < records < 310
    packed = bytearray(gzip.compress(b'{"text": "a"}\n' * 50))
    packed[-8] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    ((where, _, records),) = bad(read(tmp_path / "a.jsonl.gz"))
    assert (where, records) == ("after line 50", 50)


def test_a_zstd_frame_with_a_window_of_2_gib(tmp_path):
    """As `zstd --long=31` writes them; the published dumps of Reddit are such."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packed.compress(b'{"text": "a"}\n' * 1000) + packed.flush())
    assert good(read(tmp_path / "a.jsonl.zst")) == ["a"] * 1000


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"separators": (",\n", ":")}])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_json_array_is_read_by_element(tmp_path, monkeypatch, chunk, options):
    monkeypatch.setattr(streams, "_READ_BYTES", chunk)
    rows = [{"text": text} for text in ('é [1] \\ "]}', "漢字 😀", "x" * 100)]
    source = json.dumps([*rows, 3, {"text": "y" * 3000}], ensure_ascii=False, **options)
    path = tmp_path / "a.json"
    path.write_text(f"\n {source}\n")
    found = read(path, max_bytes=1000)
    assert good(found) == [row["text"] for row in rows]
    assert [where for where, _, _ in bad(found)] == ["element 4", "element 5"]
    path.write_text(source[:-1])
    assert bad(read(path))[-1][0] == "after element 5"
    path.write_text("[1]\n[2]\n")
    assert bad(read(path))[-1][1] == "cannot be read on: it is a JSON array, and more follows"
    path.write_text('[{"text": "a"}, {"text" "b"}]')
    assert good(read(path)) == ["a"]
    assert "element 2 of its JSON array" in bad(read(path))[0][1]


def test_rows_that_say_nothing_about_id_or_group_stand_for_themselves(tmp_path):
    path = tmp_path / "a.jsonl"
    missing = [None, "", float("nan"), []]
    path.write_text("".join(json.dumps({"text": f"{n}", "id": missing[n % 4]}) + "\n" for n in range(40)))
    rows = readers.read_rows(str(path), "jsonl")
    found = list(to_documents(str(path), rows, Fields(id="id", group="id")))
    assert [doc["id"].decode() for doc, _ in found] == [f"{path}: line {n + 1}" for n in range(40)]
    assert len({key for _, key in found}) == 40
    gathered = list(gather(readers.read_rows(str(path), "jsonl"), "id"))
    assert len(gathered) == 40
    assert all(isinstance(row, BadRow) for _, row in gathered)


def test_parquet_values_that_python_cannot_hold_are_kept_as_numbers(tmp_path):
    path = tmp_path / "a.parquet"
    moment = pyarrow.array([1, (1 << 63) - 1, 3], pyarrow.timestamp("us"))
    zone = pyarrow.array([1, 2, 3], pyarrow.timestamp("us", tz="Mars/Base"))
    table = pyarrow.table(
        {"text": ["a", "b", "c"], "t": moment, "z": zone, "s": pyarrow.array([[m] for m in moment])}
    )
    pyarrow.parquet.write_table(table, path)
    found = read(path, Fields(meta=("t", "z")), columns=["text", "t", "z"])
    assert good(found) == ["a", "b", "c"]
    assert json.loads(found[1]["meta"])["t"] == "9223372036854775807 timestamp[us]"
    assert json.loads(found[2]["meta"])["z"] == "3 timestamp[us, tz=Mars/Base]"
    assert [(where, "column 's'" in reason) for where, reason, _ in bad(read(path))] == [("row 1", True)]


def test_parquet_by_columns_with_nested_fields(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table(
        {
            "content": [f"text {n}" for n in range(300)],
            "meta": [{"repo": f"r{n % 3}", "stars": n} for n in range(300)],
            "other": [0] * 300,
            "tags": pyarrow.array([[("k", n)] for n in range(300)], pyarrow.map_("string", "int64")),
            # As RedPajama and RefinedWeb have them.
            "json": ['{"license": "mit"}'] * 300,
            "time": [datetime.datetime(2013, 5, 18)] * 300,
            "images": [[["a.png", "b"]]] * 300,
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    names = ("meta.repo", "tags.k", "json.license", "time", "images")
    fields = Fields(text="content", meta=names, group="meta.repo")
    rows = readers.read_rows(str(path), "parquet", [name.partition(".")[0] for name in ("content", *names)])
    found = list(to_documents(str(path), rows, fields))
    assert [doc["text"].decode() for doc, _ in found] == [f"text {n}" for n in range(300)]
    for number, (document, _) in enumerate(found[:2]):
        values = (f"r{number}", number, "mit", "2013-05-18 00:00:00", [["a.png", "b"]])
        assert json.loads(document["meta"]) == dict(zip(names, values, strict=True))
    assert {key for _, key in found} == {b"r0", b"r1", b"r2"}
    assert found[299][0]["where"].decode() == f"{path}: row 299"


def test_a_parquet_file_without_a_column_names_those_that_are_there(tmp_path):
    path = tmp_path / "a.parquet"
    row = {"content": "text", "meta": {"repo": "r"}, "a.b": 1}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), path)
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]).slice(1), empty)
    assert read(empty) == []
    for fields, missing in (
        (Fields(), "text"),
        (Fields(text="content", id="sha"), "sha"),
        (Fields(text="content", group="other.repo"), "other.repo"),
        (Fields(messages=lambda row: row["content"], gather="tree"), "tree"),
    ):
        files = Files(patterns={"train": str(path)}, fields=fields)
        (document,) = files.documents("train", [str(path)])
        reason = f"no column {missing!r}; there are content, meta, a.b"
        assert json.loads(document["error"]) == {"reason": reason, "records": 3}
    fields = Fields(text="content", id="a.b", group="meta.repo", meta=("not.there",))
    found = list(Files(patterns={"train": str(path)}, fields=fields).documents("train", [str(path)]))
    assert [(d["text"], d["id"], d["error"]) for d in found] == [(b"text", b"1", b"")] * 3


def test_a_corrupt_parquet_page_loses_its_row_group_and_says_how_much(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh", k=100)) for _ in range(300)]
    table = pyarrow.table({"text": texts})
    options = {"row_group_size": 100, "use_dictionary": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(table, path, **options)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 8] = bytes(8)
    path.write_bytes(data)
    found = read(path)
    assert good(found) == texts[:100] + texts[200:]
    ((where, reason, records),) = bad(found)
    assert (where, records) == ("row 100", 100)
    assert "row group 1" in reason

    def unplugged(*_, **__):
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", unplugged)
    with pytest.raises(OSError, match="the disk is gone"):  # which is no damage of the file
        read(path)


def test_bytes_in_a_parquet_string_column_spare_their_neighbours(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"a", b"\xff", None, b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    found = read(path)
    assert good(found) == ["a", "c"]
    assert [(where, reason) for where, reason, _ in bad(found)] == [
        ("row 1", "column 'text': invalid UTF-8 (byte 0xff at 0): Latin-1 or another encoding?"),
        ("row 2", "field 'text' is NoneType, not a string"),
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.txt", "a.jsonl"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_bytes(pointer)
    assert "git lfs pull" in bad(read(tmp_path / name))[0][1]
