"""LoRA: the frozen base, the adapter alone in optimizer and checkpoint, parity with peft, the way out and back."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.checkpoint.reading import restore_params
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.common.errors import UserError
from lemur_jax.config import load, replace
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.convert.peft import export_peft, read_peft
from lemur_jax.convert.source import open_again, open_source
from lemur_jax.models import decoder, lora
from lemur_jax.models.config import AdapterConfig
from lemur_jax.train import loop
from lemur_jax.train.initial import InitialParams
from lemur_jax.train.state import start
from tests.helpers.runs import write_model
from tests.helpers.tiny import placed, program_on, tiny_config

STEPS = 20
LORA = {
    "adapter.rank": 4, "adapter.alpha": 8.0, "adapter.base_dtype": "float32", "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0, "optimizer.warmup_steps": 0, "optimizer.final_learning_rate": 1e-2,
    "train.steps": STEPS,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of parameters with logits of some size."""
    config = tiny_config()
    directory = tmp_path_factory.mktemp("base") / "checkpoint"
    write_model(directory, config.model, {}, 1, lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf)
    return str(directory)


def start_run(base, options=None, shape=(1, 1, 1, 1)):
    """(config, program, first state) of an adapter of `base`."""
    config = tiny_config({"init.checkpoint": base, **LORA, **(options or {})})
    program = program_on(shape, config)
    initial = InitialParams(
        init=config.init, adapter=config.adapter, seed=config.seed, tokenizer=None, program=program
    )
    params = jax.tree.map(lambda leaf: leaf, initial.params({}))
    return config, program, start(params, program.optimizer, program.state, frozen=initial.frozen({}))


def trained(base, batch, options=None, shape=(1, 1, 1, 1), steps=3):
    config, program, state = start_run(base, options, shape)
    losses = []
    for _ in range(steps):
        state, metrics = program.step(state, placed(batch, program))
        losses.append(float(metrics["loss"]))
    return config, program, state, losses


@pytest.fixture(scope="module")
def run(base, batch):
    return trained(base, batch, steps=STEPS)


@pytest.fixture(scope="module")
def checkpoint(run, tmp_path_factory):
    """A checkpoint of the adapter after the run."""
    config, _, state, _ = run
    directory = tmp_path_factory.mktemp("adapter") / "checkpoint"
    metadata = make_metadata(model=config.model.to_dict(), tokenizer_files={}, config=config.to_json())
    write_params(directory, jax.device_get(state.params), metadata, STEPS)
    return directory


def forward(config, params, batch):
    compute = decoder.Compute(frozen=True)
    arrays = (batch[key][:2] for key in ("tokens", "positions", "segment_ids"))
    return np.asarray(decoder.forward(config.model, compute, params, *arrays))


def test_the_adapter_alone_is_trained(run):
    config, _, state, losses = run
    assert losses[-1] < losses[0] - 0.1
    adapter = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert adapter < 0.2 * decoder.num_params(config.model)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.size > 128]
    assert sum(leaf.size for leaf in moments) == 2 * adapter
    assert len(jax.tree.leaves(state.params["layers"])) == 14


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, 2, 2, 2), {"train.microbatches": 2}), ((2, 2, 1, 2), {"compute.remat": "full"})],
)
def test_same_losses_on_every_mesh(base, run, batch, shape, options):
    losses = trained(base, batch, options, shape)[3]
    np.testing.assert_allclose(losses, run[3][: len(losses)], rtol=1e-5)


def test_merged_equals_unmerged(run, checkpoint, batch):
    config, program, state, _ = run
    adapted = forward(config, program.weights(state), batch)
    wanted = decoder.abstract_params(config.model)
    merged = forward(config, open_source(checkpoint).restore(wanted), batch)
    np.testing.assert_allclose(merged, adapted, atol=2e-5)
    assert abs(adapted - forward(config, state.frozen, batch)).max() > 0.1


def test_dropout_is_a_function_of_step_and_row(base, run, batch):
    """On any mesh, with any number of microbatches, and other noise in each row and update."""
    dropout = {"adapter.dropout": 0.5, "adapter.targets": ("*",)}
    losses = trained(base, batch, dropout)[3]
    meshes = [((2, 2, 1, 1), 2), ((1, 1, 2, 2), 4)]
    for shape, microbatches in meshes:
        found = trained(base, batch, {**dropout, "train.microbatches": microbatches}, shape)[3]
        np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert abs(losses[-1] - run[3][2]) > 1e-4


def test_an_int8_base_is_near_and_trains(base, run, batch):
    *_, state, losses = trained(base, batch, {"adapter.base_dtype": "int8"}, (1, 2, 1, 1), steps=5)
    assert state.frozen["layers"]["mlp"]["gate"].qvalue.dtype == np.int8
    np.testing.assert_allclose(losses, run[3][:5], atol=0.02)


def test_a_resumed_run_reaches_the_same_bits(base, project, monkeypatch, tmp_path):
    """With dropout; the checkpoint has the adapter alone, and the base is read again: not a later step of it."""
    monkeypatch.chdir(project)
    shutil.copytree(base, base := str(tmp_path / "base"))
    words = {
        "train.steps": 4, "checkpoint.every_steps": 2, "eval.every_steps": 0, "init.checkpoint": base,
        "adapter.rank": 2, "adapter.dropout": 0.5, "adapter.targets": "('*/query', '*/down')",
    }  # fmt: skip
    config = load("config.py", [f"--config.{key}={value}" for key, value in words.items()])
    workdir = tmp_path / "run"
    loop.train(config, workdir)
    wanted = lora.abstract_adapter(config.adapter, config.model, "float32")
    model = decoder.abstract_params(config.model)
    whole, merged = restore_params(workdir, wanted), open_source(workdir).restore(model)
    later = jax.tree.map(lambda leaf: 2 * leaf, restore_params(base, model))
    write_params(base, later, make_metadata(model=config.model.to_dict(), tokenizer_files={}), 5)
    jax.tree.map(np.testing.assert_array_equal, merged, open_source(workdir).restore(model))
    shutil.rmtree(workdir / "checkpoints" / "4")
    loop.train(config, workdir)
    jax.tree.map(np.testing.assert_array_equal, whole, restore_params(workdir, wanted))
    shutil.rmtree(base)
    write_params(base, later, make_metadata(model=config.model.to_dict(), tokenizer_files={}))
    with pytest.raises(UserError, match="base was made again since this run began: its weights are others"):
        loop.train(config, workdir)
    with pytest.raises(UserError, match="is an adapter of .* its weights are others"):
        open_source(workdir)
    start = restore_params(workdir, wanted, 2)
    assert abs(start["layers"]["mlp"]["down"]["b"] - whole["layers"]["mlp"]["down"]["b"]).max() > 0


def test_a_hugging_face_base_that_changed_is_refused(base, tmp_path):
    """As a name on the hub without a revision may; files that were only copied are the same model."""
    export_hf(base, tmp_path / "hf", dtype="float32")
    origin = open_again(tmp_path / "hf", {})[1]
    shutil.copytree(tmp_path / "hf", tmp_path / "copy")
    assert open_again(tmp_path / "copy", origin)[1] == origin
    file = tmp_path / "copy" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.001
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match=r"copy was made again since this run began: .*ORG/NAME@REVISION"):
        open_again(tmp_path / "copy", origin)


def test_rslora_and_targets():
    options = AdapterConfig(rank=16, alpha=8.0, rslora=True, targets=("*/query", "head/*"))
    assert options.scale == 2.0
    model = tiny_config({}, tie_word_embeddings=False).model
    assert lora.targets(options, model) == ["layers/attention/query", "head/kernel"]
    with pytest.raises(UserError, match="fits no projection"):
        lora.targets(AdapterConfig(rank=1, targets=("*/q_proj",)), model)
    with pytest.raises(UserError, match=r"init\.checkpoint"):
        tiny_config({"adapter.rank": 4})


def test_peft_trains_the_same_and_reads_what_is_exported(base, run, checkpoint, batch, tmp_path):
    """20 updates of `peft` and `transformers` from the same first adapter; then both ways through a directory."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config, _, state, losses = run
    export_hf(base, tmp_path / "base", dtype="float32")
    first = start_run(base)[2].params
    metadata = make_metadata(model=config.model.to_dict(), tokenizer_files={}, config=config.to_json())
    write_params(tmp_path / "first", jax.device_get(first), metadata)
    export_peft(tmp_path / "first", tmp_path / "peft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft", is_trainable=True)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0
    )
    tokens, targets = (torch.tensor(batch[key]).long() for key in ("tokens", "targets"))
    weights, positions = torch.tensor(batch["loss_weights"]), torch.tensor(batch["positions"]).long()
    segments = torch.tensor(batch["segment_ids"])
    mask = (segments[:, None, :, None] == segments[:, None, None, :]) & torch.ones(64, 64).tril().bool()
    theirs = []
    for _ in range(STEPS):
        logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (each * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(losses, theirs, atol=1e-4)

    export_peft(checkpoint, tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "trained")
    merged = tmp_path / "merged"
    export_hf(checkpoint, merged, dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(
            again(input_ids=tokens[:2]).logits, whole(input_ids=tokens[:2]).logits, atol=5e-5
        )
    model.save_pretrained(tmp_path / "theirs")
    options = replace(config, {"adapter.checkpoint": str(tmp_path / "theirs")}).adapter
    back = read_peft(options, config.model, "float32")
    for ours, his in zip(jax.tree.leaves(state.params), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(ours, his, atol=2e-3)
    weights = str(tmp_path / "theirs" / "adapter_model.safetensors")
    tensors = safetensors.numpy.load_file(weights)
    next(iter(tensors.values()))[0, 0] = np.nan
    safetensors.numpy.save_file(tensors, weights)
    with pytest.raises(UserError, match="values that are not finite"):
        read_peft(options, config.model, "float32")
    described = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    for key, value in (
        *(("r", 8), ("alpha_pattern", {"q_proj": 2}), ("rank_pattern", {"q_proj": 2})),
        *(("init_lora_weights", "pissa"), ("alora_invocation_tokens", [5])),
        *(("use_dora", True), ("modules_to_save", ["lm_head"])),
    ):
        (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps({**described, key: value}))
        with pytest.raises(UserError, match=f"has {key} "):
            read_peft(options, config.model, "float32")
    (tmp_path / "trained" / "optimizer.pt").write_text("of another program")
    with pytest.raises(UserError, match="other files"):
        export_peft(checkpoint, tmp_path / "trained", overwrite=True)
    assert (tmp_path / "trained" / "optimizer.pt").exists()
