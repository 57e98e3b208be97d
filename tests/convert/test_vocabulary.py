"""Vocabulary rows against NumPy in float64."""

import pathlib
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from lemur_jax.checkpoint.metadata import tokenizer_files
from lemur_jax.checkpoint.reading import read_metadata
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.convert import vocabulary
from lemur_jax.convert.import_hf import import_hf
from lemur_jax.convert.vocabulary import Change
from lemur_jax.models.decoder import abstract_params, init_params, logical_axes
from lemur_jax.models.presets import preset
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import param_shardings
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.tokenizer import Tokenizer


def with_tokenizer(make_model, tokenizer_dir):
    hf = make_model(vocab_size=400)
    shutil.copytree(tokenizer_dir, hf.path, dirs_exist_ok=True)
    return hf


def tables(rows, dtype=np.float32, tied=False):
    rng = np.random.default_rng(0)
    params = {
        "embed": {"embedding": rng.normal(1.0, size=(rows, 6)).astype(dtype)},
        "final_norm": {"scale": np.ones(6, dtype)},
    }
    if not tied:
        params["head"] = {"kernel": rng.normal(2.0, size=(6, rows)).astype(dtype)}
    return params


@pytest.mark.parametrize(
    ("xp", "dtype", "rows", "drop", "size"),
    [
        *(
            (xp, np.float32, *sizes)
            for xp in (np.asarray, jnp.asarray)
            for sizes in ((100, 0, 105), (324, 300, 305))
        ),
        (np.asarray, ml_dtypes.bfloat16, 4000, 0, 4001),  # whose sum in bfloat16 would stop growing
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_those_that_are_kept(xp, dtype, rows, drop, size, tied):
    before, kept = tables(rows, dtype, tied), drop or rows
    after = vocabulary.resize(jax.tree.map(xp, before), size, drop_rows_above=drop, new_rows="mean")
    assert after.keys() == before.keys()
    for name, leaf in (("embed", "embedding"), ("head", "kernel"))[: 1 if tied else 2]:
        # The head is [D, V].
        old, new = (tree[name][leaf] if name == "embed" else tree[name][leaf].T for tree in (before, after))
        assert isinstance(new, np.ndarray if xp is np.asarray else jax.Array)
        assert (new.shape, new.dtype) == ((size, 6), dtype)
        np.testing.assert_array_equal(new[:kept], old[:kept])
        mean = np.broadcast_to(old[:kept].astype(np.float64).mean(0), (size - kept, 6))
        np.testing.assert_allclose(np.float64(new[kept:]), mean, rtol=1e-5 if dtype is np.float32 else 2**-8)
    assert vocabulary.resize(before, rows)["embed"]["embedding"] is before["embed"]["embedding"]


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (12, {}, "new_rows='mean'"),
        (8, {}, "drop_rows_above=8"),
        (8, {"new_rows": "mean"}, "drop_rows_above=8"),
        (12, {"drop_rows_above": 11, "new_rows": "mean"}, "first 11 vocabulary rows of a model that has 10"),
    ],
)
def test_refused(size, options, message):
    with pytest.raises(UserError, match=message):
        vocabulary.resize(tables(10), size, **options)


def test_sharded_arrays():
    config = preset("tiny", num_hidden_layers=1)
    mesh = make_mesh(dict(zip(("data", "fsdp", "sequence", "tensor"), (1, 4, 1, 2), strict=True)))
    shardings = param_shardings(mesh, abstract_params(config), logical_axes(config))
    whole = init_params(config, jax.random.key(0))
    params = jax.device_put(whole, shardings)
    after = vocabulary.resize(params, 505, drop_rows_above=500, new_rows="mean")
    expected = vocabulary.resize(jax.device_get(whole), 505, drop_rows_above=500, new_rows="mean")
    for name in ("embed", "head"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after[name], expected[name])


PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "conversion.md").read_text()


def table_of(directory, name):
    return safetensors.torch.load_file(directory / "model.safetensors")[name]


def test_the_recipes_path_as_documented(make_model, tokenizer_dir, tmp_path, monkeypatch, capsys):
    """The lines of docs/conversion.md with 400 rows where Llama-2 has 32,000."""
    hf = with_tokenizer(make_model, tokenizer_dir)
    hf.path.rename(tmp_path / "llama-2")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("320", "4").strip().splitlines():  # 32000 -> 400, 32024 -> 424
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert said.count("read again equal the checkpoint's") == 2
    assert said.count("logits (float32) equal transformers' on 512 tokens") == 2

    old = hf.state()["lm_head.weight"].bfloat16()
    lemur, chat = Tokenizer.load(tmp_path / "lemur"), Tokenizer.load(tmp_path / "lemur-chat")
    assert lemur.control_tokens["<|endoftext|>"] == 400
    assert lemur.control_tokens["<reponame>"] == 418
    assert list(chat.added_tokens.items()) == [(token, 400 + i) for i, token in enumerate(CHATML_TOKENS)]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "lemur-chat")
    assert theirs.convert_tokens_to_ids("<|im_end|>") == 402
    assert len(theirs) == 405
    for directory, rows in (("lemur", 424), ("lemur-chat", 405)):
        assert transformers.AutoConfig.from_pretrained(tmp_path / directory).vocab_size == rows
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            table = table_of(tmp_path / directory, name)
            assert table.shape == (rows, 32)
            mean = hf.state()[name].double().mean(0)
            torch.testing.assert_close(
                table[400:].double(), mean.expand(rows - 400, -1), atol=1e-3, rtol=2**-8
            )
        assert torch.equal(table_of(tmp_path / directory, "lm_head.weight")[:400], old)
    assert read_metadata("plain")["model"]["vocab_size"] == 400
    assert Tokenizer.from_files(tokenizer_files(read_metadata("plain"))).added_tokens == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop_rows_above": 401}, "--drop-rows-above 401: .* has 400 vocabulary rows"),
        ({"drop_rows_above": 399}, "model file has 400 pieces of its own"),
        ({"vocab_size": 300}, "--drop-rows-above 300"),
        ({"vocab_size": 401, "add_tokens": ("<a>", "<b>")}, "ids up to 401, .* vocab_size is 401"),
        ({"add_tokens": ("<a>", "<a>")}, "names a token twice"),
        ({"add_tokens": ("<a>", "in")}, "cannot add 'in': it is plain text in the vocabulary already"),
    ],
)
def test_a_change_that_does_not_come_out_even(make_model, tokenizer_dir, tmp_path, change, message):
    hf = with_tokenizer(make_model, tokenizer_dir)
    with pytest.raises(UserError, match=message):
        import_hf(hf.path, tmp_path / "checkpoint", change=Change(**change))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_names_of_added_tokens_are_stripped(make_model, tokenizer_dir, tmp_path, capsys):
    hf = with_tokenizer(make_model, tokenizer_dir)
    words = ["import-hf", str(hf.path), str(tmp_path / "checkpoint"), "--add-tokens"]
    assert main([*words, "<x>, "]) == 2
    assert main([*words, "<x>", "--vocab-size", "-1"]) == 2
    said = "lemur import-hf: --add-tokens takes names with commas between, the other two numbers 0 or above\n"
    assert capsys.readouterr().err.endswith(2 * said)
    assert main([*words, "<x>, <y>"]) == 0
    files = tokenizer_files(read_metadata(tmp_path / "checkpoint"))
    assert Tokenizer.from_files(files).added_tokens == {"<x>": 400, "<y>": 401}


def test_tokens_without_a_tokenizer(hf_model, tmp_path):
    with pytest.raises(UserError, match="has no tokenizer to add them to"):
        import_hf(hf_model.path, tmp_path / "checkpoint", change=Change(add_tokens=("<a>",)))
    config = import_hf(hf_model.path, tmp_path / "checkpoint", change=Change(vocab_size=104))
    assert config.vocab_size == 104
