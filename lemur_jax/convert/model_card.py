"""The README.md of an exported model: facts from the checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

from lemur_jax.convert import layout
from lemur_jax.models.config import LlamaConfig

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- lemur_jax
---
"""

_CHAT = """
Chats are in ChatML: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` formats them, and
`generation_config.json` stops at `<|im_end|>`.
"""


def model_card(config: LlamaConfig, metadata: Mapping[str, Any], dtype: str, *, chatml: bool) -> str:
    """Markdown with the model's shape and, if the checkpoint has it, its training.

    Args:
      config: the model.
      metadata: of the checkpoint.
      dtype: of the exported weights.
      chatml: whether the tokenizer has ChatML's tokens.
    """
    facts = {
        "Parameters": f"{_count(config):,}",
        "Weights": dtype,
        "Layers": f"{config.num_hidden_layers} of width {config.hidden_size}, mlp {config.intermediate_size}",
        "Heads": f"{config.num_attention_heads} of width {config.head_dim},"
        f" {config.num_key_value_heads} for keys and values",
        "Vocabulary": f"{config.vocab_size:,}" + (", head tied" if config.tie_word_embeddings else ""),
        "Positions": f"{config.max_position_embeddings:,}",
        "Rotary embedding": f"θ {config.rope_theta:,.0f}, scaling {config.rope_scaling}",
        "Checkpoint step": f"{metadata['step']:,}",
    }
    facts.update(_training(metadata.get("config")))
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"{_FRONT}\nA Llama exported by lemur_jax; `transformers.AutoModelForCausalLM` opens it.\n"
        f"{_CHAT if chatml else ''}\n| | |\n| --- | --- |\n{table}\n"
    )


def _count(config: LlamaConfig) -> int:
    return sum(math.prod(weight.shape) for weight in layout.weights(config))


def _training(config: Mapping[str, Any] | None) -> dict[str, str]:
    """Facts from the run's config; empty for imported weights that were not trained."""
    if not config:
        return {}
    data, train, optimizer = config.get("data", {}), config.get("train", {}), config.get("optimizer", {})
    sources = data.get("sources", {})
    total = sum(source.get("share", 0) for source in sources.values()) or 1
    facts = {}
    if sources:
        shares = (f"{name} {source.get('share', 0) / total:.1%}" for name, source in sources.items())
        facts["Data (share of tokens)"] = ", ".join(shares)
    if train.get("batch_rows") and data.get("sequence_length"):
        facts["Tokens an update"] = f"{train['batch_rows'] * data['sequence_length']:,}"
    if train.get("steps"):
        facts["Updates planned"] = f"{train['steps']:,}"
    if peak := optimizer.get("learning_rate"):
        facts["Learning rate"] = f"{peak:g} → {optimizer.get('final_learning_rate', 0):g}"
    return facts
