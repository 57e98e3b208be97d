"""Import of weights in every form; `test_families.py` compares what is imported with transformers."""

import functools
import json
import re
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from lemur_jax.checkpoint.metadata import tokenizer_files
from lemur_jax.checkpoint.reading import read_metadata, restore_params
from lemur_jax.cluster import coordination
from lemur_jax.common.errors import UserError
from lemur_jax.convert import safetensors as safetensors_module
from lemur_jax.convert.hf_config import read_config
from lemur_jax.convert.hf_weights import open_checked, open_weights
from lemur_jax.convert.import_hf import import_hf, load_hf_params
from lemur_jax.convert.safetensors import StoredTensor
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import abstract_params
from tests.helpers.hf_faults import FAULTS, NOT_FINITE, edit, with_one


def assert_same(got, expected):
    """Of two trees, or of two pairs of a config and a tree."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_model_that_was_saved_without_its_head(make_model):
    """As embedding models are; transformers opens it as a language model too where its head is the embedding."""
    hf = make_model(kind="Qwen3", num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    expected = load_hf_params(hf.path)
    hf.model.model.save_pretrained(hf.path)
    assert "embed_tokens.weight" in open_weights(hf.path)
    assert_same(load_hf_params(hf.path), expected)


def test_every_byte_of_a_fused_tensor_is_read_once(make_model, monkeypatch):
    """As from an object store, where a tensor is not mapped."""
    hf = make_model(kind="Phi3", pad_token_id=0, num_key_value_heads=2)
    read = []
    opened = type(epath.Path()).open

    def counting(path, *arguments, **options):
        file = opened(path, *arguments, **options)
        whole = file.read
        monkeypatch.setattr(file, "read", lambda size=-1: read.append(whole(size)) or read[-1], raising=False)
        return file

    monkeypatch.setattr(safetensors_module, "is_object_store", lambda path: True)
    tensors = open_checked(read_config(hf.path), hf.path)
    monkeypatch.setattr(type(epath.Path()), "open", counting)
    for tensor in tensors.values():
        assert tensor.read().nbytes == len(read[-1])
    assert sum(map(len, read)) == sum(tensor.nbytes for tensor in hf.state().values())


def test_hosts_compare_a_row_of_each_matrix_that_is_of_no_expert(make_model, monkeypatch):
    """Each may be a request to an object store. One host alone compares nothing."""
    hf = make_model(kind="Mixtral", num_key_value_heads=2, num_local_experts=4)
    monkeypatch.setattr(coordination, "exchange", lambda name, value, seconds: [])
    rows = []
    monkeypatch.setattr(StoredTensor, "read", lambda row: rows.append(row) or np.zeros(1))
    # Embedding, head; attention and router of three layers.
    for service, expected in ((None, 0), (object(), 2 + 3 * 5)):
        monkeypatch.setattr(coordination, "client", lambda service=service: service)
        with pytest.raises(KeyError):  # no parameter has a place
            load_hf_params(hf.path, {})
        assert len(rows) == expected


def to_bin(hf, shards=1):
    """The state dict as `.bin` files in place of safetensors; returns them."""
    (hf.path / "model.safetensors").unlink()
    state, last = hf.state(), f"-of-{shards:05}.bin"
    if shards == 1:
        torch.save(state, hf.path / "pytorch_model.bin")
        return [hf.path / "pytorch_model.bin"]
    weight_map = {name: f"pytorch_model-{1 + index % shards:05}{last}" for index, name in enumerate(state)}
    files = sorted(set(weight_map.values()))
    for file in files:
        torch.save({name: state[name] for name in state if weight_map[name] == file}, hf.path / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (hf.path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return [hf.path / file for file in files]


def link(hf):
    """As in the hub's cache."""
    (hf.path / "model.safetensors").rename(hf.path.parent / "blob")
    (hf.path / "model.safetensors").symlink_to("../blob")


def in_shards(hf):
    (hf.path / "model.safetensors").unlink()
    hf.model.save_pretrained(hf.path, max_shard_size="20KB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [in_shards, link, to_bin, functools.partial(to_bin, shards=3)])
def test_however_weights_are_stored(make_model, change, dtype):
    hf = make_model(dtype)
    expected = load_hf_params(hf.path)
    change(hf)
    assert (hf.path / "model.safetensors").exists() == (change is link)
    assert_same(load_hf_params(hf.path), expected)


def test_bin_files_need_torch(hf_model, monkeypatch):
    to_bin(hf_model)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="install torch"):
        open_weights(hf_model.path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "cannot be read as weights"),
        (lambda content: b"", "holds no weights of PyTorch .*: .*download it again"),
        (
            lambda content: b"version https://git-lfs.github.com/spec/v1\n",
            "holds no .*: .*run `git lfs pull`",
        ),
        (None, r"is missing, but pytorch_model\.bin\.index\.json lists it"),
    ],
)
def test_a_damaged_bin_file(hf_model, damage, message):
    _, file, _ = to_bin(hf_model, shards=3)
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    with pytest.raises(UserError, match=f"{file.name} {message}"):
        load_hf_params(hf_model.path)


def test_bin_file_with_code_in_it(hf_model, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (file,) = to_bin(hf_model)
    torch.save({"model.norm.weight": Trap()}, file)
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_hf_params(hf_model.path)
    assert not (tmp_path / "sprung").exists()


def test_checkpoint(make_model, tmp_path, tokenizer_dir):
    hf = make_model(vocab_size=400)
    shutil.copytree(tokenizer_dir, hf.path, dirs_exist_ok=True)
    config = import_hf(hf.path, tmp_path / "checkpoint")
    metadata = read_metadata(tmp_path / "checkpoint")
    assert DecoderConfig.from_dict(metadata["model"]) == config
    assert (metadata["step"], metadata["config"]) == (0, None)
    files = tokenizer_files(metadata)
    assert files["tokenizer.model"] == (tokenizer_dir / "tokenizer.model").read_bytes()
    assert "tokenizer_config.json" in files
    params = restore_params(tmp_path / "checkpoint", abstract_params(config))
    assert_same(jax.device_get(params), load_hf_params(hf.path)[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_existing_target(make_model, tmp_path):
    hf, target = make_model(), tmp_path / "checkpoint"
    import_hf(hf.path, target)
    with pytest.raises(UserError, match="exists already"):
        import_hf(hf.path, target)
    import_hf(hf.path, target, dtype="bfloat16", overwrite=True)
    config = load_hf_params(hf.path)[0]
    restored = restore_params(target, abstract_params(config, "bfloat16"))
    assert restored["final_norm"]["scale"].dtype == ml_dtypes.bfloat16
    (target / "1000").mkdir()  # a training's: never deleted
    with pytest.raises(UserError, match="remove it yourself"):
        import_hf(hf.path, target, overwrite=True)
    assert (target / "0").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_write_nothing(make_model, tmp_path, fault):
    hf = make_model()
    damage, message = FAULTS[fault]
    damage(hf)
    with pytest.raises(UserError, match=message):
        import_hf(hf.path, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(UserError, match=message):
        load_hf_params(hf.path)


def test_a_fault_that_is_met_while_writing_is_one_line(make_model, tmp_path):
    """In a process of its own, in which nobody has looked after what Orbax logs."""
    hf = make_model()
    FAULTS["NaN"][0](hf)
    command = [sys.executable, "-m", "lemur_jax", "import-hf", str(hf.path), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert re.fullmatch(rf"lemur import-hf: \S*{NOT_FINITE.format('norm')}.*\n", done.stderr)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("int8", "unknown dtype 'int8'"), ("float16", r"model\.norm\.weight has a value of 70000, .*float16")],
)
def test_a_dtype_that_cannot_hold_the_weights(hf_model, tmp_path, dtype, message):
    edit(model__norm__weight=with_one(-70_000.0, 32))(hf_model)
    with pytest.raises(UserError, match=message):
        import_hf(hf_model.path, tmp_path / "checkpoint", dtype=dtype)


def test_a_second_tied_head_is_ignored(make_model):
    hf = make_model(tie_word_embeddings=True)
    edit(lm_head__weight=hf.state()["model.embed_tokens.weight"].clone())(hf)
    _, params = load_hf_params(hf.path)
    assert "head" not in params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["single", "in no index", "in the index", "bin"])
def test_buffers_that_transformers_ignores(hf_model, kind, dtype):
    """Old versions of transformers saved a table of angles for each layer, or one for the model."""
    path, state, expected = hf_model.path, hf_model.state(), load_hf_params(hf_model.path)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        state[name] = torch.arange(4).to(dtype)
    (path / "model.safetensors").unlink()
    file = "model.safetensors" if kind == "single" else "model-00001-of-00001.safetensors"
    if kind == "bin":
        torch.save(state, path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path / file)
    if kind.endswith("index"):
        listed = state if kind == "in the index" else hf_model.state()
        index = {"metadata": {}, "weight_map": dict.fromkeys(listed, file)}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_hf_params(path), expected)
