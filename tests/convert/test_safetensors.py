"""Reader and writer against the safetensors library, and a corpus of damaged files."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.common.errors import UserError
from lemur_jax.convert import hf_weights
from lemur_jax.convert import safetensors as safetensors_module
from lemur_jax.convert.safetensors import plan_shards, read_header, write_weights


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_the_library_writes(tmp_path, monkeypatch, dtype, remote):
    """Also in pieces, as from an object store (`test_directory.py` has a server)."""
    monkeypatch.setattr(safetensors_module, "is_object_store", lambda path: remote)
    monkeypatch.setattr(safetensors_module, "_PIECE_BYTES", 8)
    path, shapes = tmp_path / "x.safetensors", {"a": (3, 5), "b": (7,), "c": (), "d": (0, 2)}
    state = {
        name: torch.randn(shape).to(dtype) for name, shape in shapes.items() if remote or shape != (0, 2)
    }
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    tensors = read_header(path)
    assert set(tensors) == set(state)
    for name, expected in state.items():
        got = tensors[name].read()
        assert got.shape == tuple(expected.shape)
        assert got.tobytes() == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
    if remote:
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(UserError, match=r"x\.safetensors has become shorter while it was read"):
            [tensor.read() for tensor in tensors.values()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_what_is_written(tmp_path, dtype):
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=shape).astype(numpy_dtype) for name, shape in [("b", (3, 4)), ("a", (5,))]}
    shapes = {name: array.shape for name, array in state.items()}
    write_weights(epath.Path(tmp_path), shapes, dtype, iter(state.items()), 1e9)
    path = tmp_path / "model.safetensors"
    loaded = safetensors.torch.load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == shapes
    for name, tensor in loaded.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == state[name].tobytes()
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # readers map the tensors
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_their_index(tmp_path):
    sizes = {"a": 4, "b": 4, "c": 20, "d": 4}
    assert list(plan_shards(sizes, 100)) == ["model.safetensors"]
    assert list(plan_shards(sizes, 8).values()) == [["a", "b"], ["c"], ["d"]]
    shapes = {name: (size // 4,) for name, size in sizes.items()}
    tensors = ((name, np.ones(shape, np.float32)) for name, shape in shapes.items())
    write_weights(epath.Path(tmp_path), shapes, "float32", tensors, 8)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    numbers = {"a": 1, "b": 1, "c": 2, "d": 3}
    files = {name: f"model-0000{number}-of-00003.safetensors" for name, number in numbers.items()}
    assert index == {"metadata": {"total_size": 32}, "weight_map": files}


DAMAGED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": b"\0" * 8,
    "header longer than file": file_of({"a": entry()}, b"\0" * 8, length=1000),
    "header of 2^64 - 1": file_of({"a": entry()}, b"\0" * 8, length=(1 << 64) - 1),
    "not json": file_of(b"abcdefgh"),
    "not utf-8": file_of(b'{"\xff\xfe": 1}'),
    "a list": file_of([]),
    "deep nesting": file_of(b"[" * 100_000),
    "an entry without shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "an entry with more": file_of({"a": {**entry(), "x": 1}}, b"\0" * 8),
    "name twice": file_of(json.dumps({"a": entry(), "b": entry()}).replace("b", "a").encode(), b"\0" * 8),
    "unknown dtype": file_of({"a": entry("F7")}, b"\0" * 8),
    "shape negative": file_of({"a": entry(shape=(-2,))}, b"\0" * 8),
    "shape a string": file_of({"a": {**entry(), "shape": "2"}}, b"\0" * 8),
    "shape of booleans": file_of({"a": entry(shape=(True, 2))}, b"\0" * 8),
    "shape of fractions": file_of({"a": entry(shape=(2.0,))}, b"\0" * 8),
    "shape that overflows 64 bits": file_of({"a": entry(shape=(1 << 62, 1 << 62))}, b"\0" * 8),
    "shape that wraps to 8 bytes": file_of({"a": entry(shape=((1 << 62) + 1, 2))}, b"\0" * 8),
    "number of 10,000 digits": file_of(b'{"a": ' + b"9" * 10_000 + b"}"),
    "offsets reversed": file_of({"a": entry(offsets=(8, 0))}, b"\0" * 8),
    "offsets of three": file_of({"a": entry(offsets=(0, 8, 8))}, b"\0" * 8),
    "offsets beyond the file": file_of({"a": entry(offsets=(8, 16))}, b"\0" * 8),
    "size other than shape": file_of({"a": entry(offsets=(0, 4))}, b"\0" * 4),
    "overlap": file_of({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
    "gap": file_of({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20),
    "data cut short": file_of({"a": entry()}, b"\0" * 7),
    "data left over": file_of({"a": entry()}, b"\0" * 9),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[damage])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # whatever sizes the file promises
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_weights_of_other_types_are_no_damage(tmp_path, dtype):
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensor a has dtype .* use the original, unquantized model") as error:
        read_header(tmp_path / "model.safetensors")
    assert "damaged" not in str(error.value)


def test_a_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 4976698672\n")
    with pytest.raises(UserError, match=r"model\.safetensors is not .*it is a Git LFS pointer.*git lfs pull"):
        read_header(path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 90), byte=st.integers(0, 255))
def test_flipped_bytes_give_errors_or_the_same_promises(tmp_path_factory, position, byte):
    good = bytearray(file_of({"a": entry(), "b": entry(shape=(1, 2), offsets=(8, 16))}, b"\0" * 16))
    good[position] = byte
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(good)
    try:
        tensors = read_header(path)
    except UserError:
        return
    assert sum(tensor.read().nbytes for tensor in tensors.values()) == 16


def sharded(directory, weight_map, files):
    for file in files:
        (directory / file).write_bytes(file_of({"a": entry()}, b"\0" * 8))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", ".x.safetensors", 5, None, [],
     "C:\\x.safetensors", "gs://bucket/x.safetensors", "x.bin", "x.safetensors\n", "x\0.safetensors"],
)  # fmt: skip
def test_index_pointing_elsewhere(tmp_path, file):
    (tmp_path / "hf").mkdir()
    sharded(tmp_path / "hf", {"a": file}, ["../secret.safetensors"])
    with pytest.raises(UserError, match="not the name of a"):
        hf_weights.open_weights(tmp_path / "hf")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"a": "gone.safetensors"}, "missing"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "lacks tensor b"),
        (
            {"a": "one.safetensors", "b": "two.safetensors"},
            r"two.safetensors (lacks tensor b|holds tensor a)",
        ),
        ({"b": "one.safetensors"}, "one.safetensors holds tensor a, which .* does not list there"),
    ],
)
def test_index_that_disagrees(tmp_path, weight_map, message):
    sharded(tmp_path, weight_map, ("one.safetensors", "two.safetensors"))
    with pytest.raises(UserError, match=message):
        hf_weights.open_weights(tmp_path)


def test_names_in_a_file_are_shown_in_one_short_line(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"\x1b[31m" + "n" * 10_000: entry("I64")}, b"\0" * 8))
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)
