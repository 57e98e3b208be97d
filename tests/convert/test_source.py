"""A Hugging Face directory as it is: read once, each device its part, and the same as an import."""

import collections

import jax
import numpy as np
import pytest
import torch

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.convert.import_hf import import_hf
from lemur_jax.convert.safetensors import StoredTensor
from lemur_jax.convert.source import open_source
from lemur_jax.infer.session import abstract_params
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.text.tokenizer import read_files


def mesh(*sizes):
    return make_mesh(dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2)])
def test_both_kinds_give_the_same_arrays(make_model, tmp_path, monkeypatch, sizes, dtype):
    """And each tensor of a directory is read once for all devices."""
    reads = collections.Counter()
    read = StoredTensor.read

    def counted(self):
        reads[self.name] += 1
        return read(self)

    hf = make_model(torch.bfloat16, num_key_value_heads=2)
    import_hf(hf.path, tmp_path / "imported", dtype="bfloat16")
    direct, imported = open_source(hf.path), open_source(tmp_path / "imported")
    assert direct.model == imported.model
    wanted = abstract_params(direct.model, mesh(*sizes), dtype)
    monkeypatch.setattr(StoredTensor, "read", counted)
    got, expected = direct.restore(wanted), imported.restore(wanted)
    assert reads == dict.fromkeys(hf.state(), 1)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for mine, theirs, want in zip(*map(jax.tree.leaves, (got, expected, wanted)), strict=True):
        assert mine.sharding == want.sharding
        assert mine.dtype == want.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_arrays_can_be_donated_and_leave_no_trace_in_each_other(make_model):
    """Devices that hold the same block were given the same memory of the host."""
    hf = make_model()
    source = open_source(hf.path)
    wanted = abstract_params(source.model, mesh(8, 1, 1, 1), "float32")
    params = source.restore(wanted)
    before = jax.tree.map(np.array, params)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    for array, old in zip(*map(jax.tree.leaves, (double(params), before)), strict=True):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, 2 * old)


def test_tokenizer_comes_along(make_model, tokenizer_dir):
    hf = make_model()
    assert open_source(hf.path).tokenizer_files == {}
    files = read_files(tokenizer_dir)
    for name, content in files.items():
        (hf.path / name).write_bytes(content)
    with pytest.raises(UserError, match="the tokenizer has ids up to 399, but the model's vocab_size is 96"):
        open_source(hf.path)
    hf = make_model(vocab_size=400)
    stops = {"generation_config.json": (hf.path / "generation_config.json").read_bytes()}
    assert open_source(hf.path).tokenizer_files == files | stops


def test_what_cannot_be_opened(make_model, capsys):
    hf = make_model()
    words = ["generate", "--checkpoint", str(hf.path), "--prompt", "x"]

    def check(message, *more):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err

    check("is a Hugging Face directory, which has no step 3", "--step", "3")
    check("holds no tokenizer")
    with torch.no_grad():
        hf.model.model.norm.weight[3] = float("nan")
    hf.model.save_pretrained(hf.path)
    source = open_source(hf.path)
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that are not finite"):
        source.restore(abstract_params(source.model, mesh(1, 8, 1, 1), "float32"))
    (hf.path / "model.safetensors").unlink()
    check(f"{hf.path} holds no weights")
    (hf.path / "model.safetensors").write_bytes(b"short")
    check("model.safetensors is not a whole safetensors file")
    (hf.path / "checkpoints").mkdir()
    check(f"{hf.path} holds Hugging Face weights and checkpoints: name")
