"""Export, reopened by transformers and compared bit for bit."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import tensorstore
import torch
import transformers

from lemur_jax.checkpoint.digest import RunningDigest
from lemur_jax.checkpoint.metadata import Damaged, make_metadata
from lemur_jax.checkpoint.reading import read_metadata, read_slices, restore_params
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.common.errors import UserError
from lemur_jax.convert import export_hf as export_module
from lemur_jax.convert import layout
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.convert.import_hf import import_hf
from lemur_jax.convert.model_card import model_card
from lemur_jax.models.decoder import abstract_params
from lemur_jax.models.presets import preset
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import extend

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 256},
}
VARIANTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa tied llama3": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "mqa wide heads": {"num_key_value_heads": 1, "head_dim": 24},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_file(directory):
    state = {}
    for file in sorted(directory.glob("*.safetensors")):
        state.update(safetensors.torch.load_file(file))
    return state


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "imported"), [*zip(DTYPES, DTYPES, strict=True), ("bfloat16", "float32")])
def test_import_then_export_is_bit_exact(make_model, variant, tmp_path, dtype, imported):
    hf = make_model(DTYPES[dtype], **VARIANTS[variant])
    import_hf(hf.path, tmp_path / "checkpoint", dtype=imported)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", dtype=dtype)
    # The files: the same tensors as transformers wrote.
    before, after = read_file(hf.path), read_file(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(bits(before[name]), bits(after[name])), name
    # And what transformers makes of them.
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == DTYPES[dtype]
    assert model.config.rope_parameters == hf.model.config.rope_parameters
    for name, tensor in hf.state().items():
        assert torch.equal(bits(tensor), bits(model.state_dict()[name])), name


def test_shards_without_a_tokenizer(hf_model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SHARD_BYTES", 20_000)
    export_hf(checkpoint, tmp_path / "out", dtype="float32")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 24_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in read_file(hf_model.path).values()
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, None)  # none is invented
    for name, tensor in hf_model.state().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_layers_are_read_chunk_by_chunk(monkeypatch):
    weight = next(row for row in layout.weights(preset("tiny", num_hidden_layers=5)) if "query" in row.path)
    values = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
    spec = {"driver": "zarr", "kvstore": "memory://", "metadata": {"chunks": [2, *weight.shape[1:]]}}
    array = tensorstore.open(spec, create=True, dtype=tensorstore.float32, shape=values.shape).result()
    array.write(values).result()
    sizes = []

    def watched(array, cuts, name):
        for block in read_slices(array, cuts, name):
            sizes.append(len(block))
            yield block

    monkeypatch.setattr(export_module, "read_slices", watched)
    digest = RunningDigest()
    digest.update(values)

    def read():
        return export_module.read_parameter(array, weight, digest.value, "here: parameter query")

    streamed = dict(read())
    assert sizes == [2, 2, 1]
    assert list(streamed) == list(weight.names)
    for layer, name in enumerate(weight.names):
        np.testing.assert_array_equal(weight.from_hf(streamed[name]), values[layer])
    array[3, 1, 2, 3].write(9.0).result()
    with pytest.raises(Damaged, match="here: parameter query is damaged: it is not what was saved"):
        list(read())


@pytest.fixture
def export_with(make_model, tmp_path):
    """export_with(tokenizer, vocab_size, change): exports a model with that tokenizer; returns the directory."""

    def export(tokenizer, vocab_size, change=lambda path: None):
        hf = make_model(torch.bfloat16, vocab_size=vocab_size)
        shutil.copytree(tokenizer, hf.path, dirs_exist_ok=True)
        change(hf.path)
        import_hf(hf.path, tmp_path / "checkpoint")
        export_hf(tmp_path / "checkpoint", tmp_path / "out")
        return tmp_path / "out"

    return export


def test_base_model_directory(export_with, tokenizer_dir):
    out = export_with(tokenizer_dir, 400)
    for configs in (transformers.GenerationConfig, transformers.AutoConfig):
        config = configs.from_pretrained(out)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    text = "def parent(path):\n    return path.parent"
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs(text)["input_ids"] == [1, *Tokenizer.load(tokenizer_dir).encode(text)]
    card = (out / "README.md").read_text()
    assert "| Weights | bfloat16 |" in card
    assert "ChatML" not in card


CHATML = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("template", "text"), [("", CHATML), ("{{ messages[0]['content'] }}", " hello ")])
def test_chat_model_directory(export_with, tmp_path, tokenizer_dir, template, text):
    """Without a template of its own it gets ChatML's."""
    tokenizer = extend(tokenizer_dir, tmp_path / "chat", CHATML_TOKENS)
    end = tokenizer.added_tokens["<|im_end|>"]
    file = tmp_path / "chat" / "chat_template.jinja"
    file.write_text(template) if template else file.unlink()
    out = export_with(tmp_path / "chat", 405)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [end, 2]
    assert generation.pad_token_id == tokenizer.added_tokens["<pad>"]
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": " hello "}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    # The model's only answer is <|im_end|>: transformers stops there by the files alone.
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.lm_head.forward = lambda x: torch.eye(405)[end].expand(1, x.shape[1], 405)
    prompt = torch.tensor([[1, 5, 6]])
    assert model.generate(prompt, max_new_tokens=8).tolist() == [[1, 5, 6, end]]
    assert "ChatML" in (out / "README.md").read_text()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_it_stops_at_the_end_of_a_turn_and_where_the_imported_model_stopped(
    export_with, tmp_path, tokenizer_dir, file
):
    def change(path):
        (path / "generation_config.json").unlink()
        content = json.loads((path / file).read_text()) if file == "config.json" else {}
        (path / file).write_text(json.dumps(content | {"eos_token_id": [2, 7]}))

    extend(tokenizer_dir, tmp_path / "chat", ["<|eot_id|>"])
    out = export_with(tmp_path / "chat", 401, change)
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [400, 2, 7]


def test_existing_target(checkpoint, tmp_path, monkeypatch):
    out, home = tmp_path / "out", tmp_path / "home"
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "MAX_SHARD_BYTES", 20_000)
        out.mkdir()
        export_hf(checkpoint, out, dtype="float32", overwrite=True)  # of an empty directory
    before = {file.name for file in out.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        export_hf(checkpoint, out)
    assert {file.name for file in out.iterdir()} == before
    export_hf(checkpoint, out, overwrite=True)
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf", "out"]
    # What is no export is never deleted.
    home.mkdir()
    for name in ("thesis.tex", "config.json"):
        (home / name).write_text("{}")
    for directory in (home, checkpoint):
        with pytest.raises(UserError, match="remove it yourself"):
            export_hf(checkpoint, directory, overwrite=True)
    assert (home / "thesis.tex").exists()


def write_changed(checkpoint, target, change, **model):
    """A checkpoint beside, with changed parameters or shape."""
    metadata = read_metadata(checkpoint)
    config = preset("tiny").from_dict(metadata["model"])
    params = jax.device_get(restore_params(checkpoint, abstract_params(config)))
    change(params)
    write_params(target, params, make_metadata(model=config.to_dict() | model, tokenizer_files={}))


def set_value(value):
    def change(params):
        up = params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"].copy()
        up[1, 3, 4] = value

    return change


def test_float16_overflow_names_the_tensor(checkpoint, tmp_path):
    write_changed(checkpoint, tmp_path / "changed", set_value(1e5))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has a value of 100000"):
        export_hf(tmp_path / "changed", tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "checkpoint", "hf"]
    export_hf(tmp_path / "changed", tmp_path / "out", dtype="bfloat16")
    # Infinity is exported as it is.
    write_changed(checkpoint, tmp_path / "infinite", set_value(np.inf))
    export_hf(tmp_path / "infinite", tmp_path / "out", dtype="float16", overwrite=True)
    assert read_file(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"][4, 3] == torch.inf


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        (lambda params: params.pop("head"), {}, "parameter head/kernel is missing"),
        (
            lambda params: params["layers"]["mlp"].update(bias=np.zeros(3, ml_dtypes.bfloat16)),
            {},
            "parameter layers/mlp/bias is not part",
        ),
        (lambda params: None, {"vocab_size": 97}, r"parameter embed/embedding has shape \[96, 32\]"),
    ],
)
def test_checkpoint_that_is_not_its_model(checkpoint, tmp_path, change, model, message):
    write_changed(checkpoint, tmp_path / "changed", change, **model)
    with pytest.raises(UserError, match=message):
        export_hf(tmp_path / "changed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_data(checkpoint, tmp_path):
    data = sorted((checkpoint / "0" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)[-1]
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be"):
        export_hf(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        export_hf(checkpoint, tmp_path / "out", step=7)
    with pytest.raises(UserError, match="no checkpoint directory"):
        export_hf(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="no finished checkpoint in .*hf: it holds Hugging Face weights"):
        export_hf(tmp_path / "hf", tmp_path / "out")


def test_tokenizer_file_outside_the_directory(tmp_path):
    params = {"final_norm": {"scale": np.ones(3, np.float32)}}
    metadata = make_metadata(model=preset("tiny").to_dict(), tokenizer_files={"../evil": b"x"})
    write_params(tmp_path / "checkpoint", params, metadata)
    with pytest.raises(UserError):
        export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_card_tells_of_the_training():
    """Of a run of an older version, whose config lacks keys."""
    sources = {"code": {"share": 10.0}, "text": {"share": 1.0}}
    later = [{"step": step, "shares": {"code": 1.0, "text": 3.0}} for step in (200, 250)]
    run = {
        "data": {
            "sources": sources,
            "sequence_length": 4096,
            "stages": {"anneal": later[0], "late": later[1]},
        },
        "train": {"batch_rows": 1024, "steps": 500},
        "optimizer": {"learning_rate": 4e-5, "final_learning_rate": 4e-6},
    }
    card = model_card(preset("lemur_70b"), {"step": 250, "config": run}, "bfloat16", chatml=False)
    assert "| Tokens an update | 4,194,304 |" in card
    assert "code 90.9%, text 9.1%" in card
    assert card.count("Data from") == card.count("| Data from update 200 on | code 25.0%, text 75.0% |") == 1
    assert "| Learning rate | 4e-05 → 4e-06 |" in card
    assert "| Checkpoint step | 250 |" in card
