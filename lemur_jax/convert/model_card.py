"""The README.md of an exported model: facts from the checkpoint."""

from collections.abc import Mapping
from typing import Any

from lemur_jax.common.sections import fill
from lemur_jax.config import RunConfig
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import num_params

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- lemur_jax
---

A model exported by lemur_jax; `transformers.AutoModelForCausalLM` opens it.
"""

_CHAT = """
Chats are in ChatML: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` formats them, and
`generation_config.json` stops at `<|im_end|>`.
"""


def model_card(config: DecoderConfig, metadata: Mapping[str, Any], dtype: str, *, chatml: bool) -> str:
    """Markdown with the model's shape and, if the checkpoint's metadata has a run's config, its training."""
    facts = {
        "Parameters": f"{num_params(config):,}",
        "Weights": dtype,
        "Layers": f"{config.num_hidden_layers} of width {config.hidden_size}, mlp {config.intermediate_size}",
        "Heads": f"{config.num_attention_heads} of width {config.head_dim},"
        f" {config.num_key_value_heads} for keys and values",
        "Vocabulary": f"{config.vocab_size:,}" + (", head tied" if config.tie_word_embeddings else ""),
        "Positions": f"{config.max_position_embeddings:,}",
        "Rotary embedding": f"θ {config.rope_theta:,.0f}, scaling {config.rope_scaling}",
        "Checkpoint step": f"{metadata['step']:,}",
    }
    if config.num_experts:
        facts["Experts"] = f"{config.num_experts}, {config.experts_per_token} a token"
    if run := metadata.get("config"):
        run = fill(RunConfig, run)  # of an older version it may lack keys
        data, train, optimizer = run["data"], run["train"], run["optimizer"]
        if sources := data["sources"]:  # reinforcement learning has none
            facts["Data (share of tokens)"] = _percent({name: sources[name]["share"] for name in sources})
        for stage in data["stages"].values():
            if stage["step"] < metadata["step"]:
                facts[f"Data from update {stage['step']:,} on"] = _percent(stage["shares"])
        facts["Tokens an update"] = f"{train['batch_rows'] * data['sequence_length']:,}"
        facts["Updates planned"] = f"{train['steps']:,}"
        facts["Learning rate"] = f"{optimizer['learning_rate']:g} → {optimizer['final_learning_rate']:g}"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"{_FRONT}{_CHAT if chatml else ''}\n| | |\n| --- | --- |\n{table}\n"


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share / sum(shares.values()):.1%}" for name, share in shares.items())
