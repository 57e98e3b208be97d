"""Damage to a Hugging Face directory of `make_model`, and the message of the refusal."""

import safetensors.torch
import torch


def truncate(hf):
    """Removes the last byte of the weights."""
    file = hf.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def edit(**changes):
    """Changes tensors of the model file; None removes one."""

    def damage(hf):
        file = hf.path / "model.safetensors"
        state = safetensors.torch.load_file(file)
        state.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        safetensors.torch.save_file(kept, file)

    return damage


def config(**changes):
    """Changes keys of config.json."""
    return lambda hf: hf.edit_config(**changes)


def with_one(value, *shape):
    """A tensor with one such value."""
    tensor = torch.ones(shape)
    tensor[3] = value
    return tensor


NOT_FINITE = r"hf/model.safetensors: weight model.{}.weight has values that are not finite"

FAULTS = {
    "truncated": (truncate, "not a whole safetensors file"),
    "no weights": (lambda hf: (hf.path / "model.safetensors").unlink(), "holds no weights"),
    "missing": (
        edit(model__layers__1__mlp__up_proj__weight=None),
        r"model\.layers\.1\.mlp\.up_proj\.weight is missing$",
    ),
    "missing head": (edit(lm_head__weight=None), r"lm_head\.weight is missing"),
    "unexpected": (
        edit(model__layers__0__self_attn__q_proj__bias=torch.zeros(32)),
        r"model\.layers\.0\.self_attn\.q_proj\.bias is not part",
    ),
    "a name that is a path": (edit(**{"../../outside": torch.zeros(2)}), r"\.\./outside is not part of this"),
    "one layer more": (
        edit(model__layers__3__mlp__up_proj__weight=torch.zeros(80, 32)),
        r"layers\.3\.mlp\.up_proj\.weight is not part",
    ),
    "shape": (edit(model__norm__weight=torch.ones(31)), r"model\.norm\.weight has shape \[31\], .* \[32\]"),
    "transposed": (
        edit(model__layers__0__mlp__up_proj__weight=torch.zeros(32, 80)),
        r"up_proj\.weight has shape \[32, 80\], .* \[80, 32\]",
    ),
    "integers": (edit(model__norm__weight=torch.ones(32, dtype=torch.int32)), "dtype I32"),
    "NaN": (edit(model__norm__weight=with_one(torch.nan, 32)), NOT_FINITE.format("norm")),
    "infinity in a stacked one": (
        edit(model__layers__1__post_attention_layernorm__weight=with_one(-torch.inf, 32)),
        NOT_FINITE.format("layers.1.post_attention_layernorm"),
    ),
    "another vocabulary": (
        config(vocab_size=97),
        r"embed_tokens\.weight has shape \[96, 32\], .* \[97, 32\]",
    ),
    "more layers": (config(num_hidden_layers=4), r"model\.layers\.3\..* is missing \(and 8 more\)"),
    "a million million layers": (config(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
    "tied but two heads": (config(tie_word_embeddings=True), r"lm_head\.weight differs from"),
    "biases": (config(attention_bias=True), "q_proj.bias is missing"),
    "an adapter beside it": (
        lambda hf: (hf.path / "adapter_config.json").write_text("{}"),
        r"hf holds a PEFT adapter \(adapter_config\.json\): train from it with its base",
    ),
    "no config": (lambda hf: (hf.path / "config.json").unlink(), "config.json does not exist"),
}
