"""Checks an exported directory against the checkpoint: every tensor, and the logits."""

import argparse
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from scipy.special import log_softmax

from lemur_jax.common.errors import UserError
from lemur_jax.convert.hf_weights import open_checked
from lemur_jax.convert.import_hf import load_hf_params
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Compute, forward, num_params
from lemur_jax.text.tokenizer import Tokenizer

TOKENS = 512
# Relative to the largest float32 logit: rounding gives 1e-6 to 1e-5, a wrong rotary angle or norm far more.
TOLERANCE = 1e-3


def compare_tensors(
    directory: epath.Path, config: DecoderConfig, expected: Iterator[tuple[str, np.ndarray]]
) -> str:
    """Compares every tensor of a Hugging Face directory bit for bit with the checkpoint's, one at a time.

    Returns a line with the amount that was compared; a UserError names the first tensor that differs.
    """
    written = open_checked(config, directory)
    count = size = 0
    for name, tensor in expected:
        stored = written[name].read()
        if stored.dtype != tensor.dtype:
            raise UserError(f"{written[name].path}: tensor {name} is {stored.dtype}, not {tensor.dtype}")
        uint = f"u{tensor.dtype.itemsize}"
        differs = stored.view(uint) != tensor.view(uint)
        if differs.any():
            raise UserError(
                f"{written[name].path}: tensor {name} differs from the checkpoint in {int(differs.sum())} of"
                f" {differs.size} values, first at {np.argwhere(differs)[0].tolist()}"
            )
        count, size = count + 1, size + tensor.nbytes
    return f"verified: {count} tensors ({size / 1e6:,.1f} MB) read again equal the checkpoint's"


def compare_logits(directory: epath.Path, config: DecoderConfig, tokenizer: Tokenizer | None) -> str:
    """Compares our logits with those of `transformers`, in float32, on up to 512 tokens of source code.

    Both use the weights in the directory; ours takes the shape from the checkpoint, theirs from the files, so that a
    mistake in `config.json` shows. Tokens are random without a tokenizer. Returns a line with the largest difference
    and the Kullback-Leibler divergence, or why nothing was compared; UserError for more than rounding.
    """
    try:
        import torch
    except ImportError:
        return "logits not compared: torch is not installed"
    if "://" in str(directory):
        return f"logits not compared: transformers does not open {directory}"
    size = num_params(config)
    free = _available_memory()
    if 10 * size > free:  # both models in float32, and some space
        return f"logits not compared: that takes {10 * size / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
    tokens = _tokens(config, tokenizer)
    logits = _our_logits(directory, config, tokens)
    model = transformers_model(str(directory))
    with torch.no_grad():
        reference = model(torch.tensor(tokens)).logits.numpy()
    largest, scale = np.abs(logits - reference).max(), max(1.0, np.abs(reference).max())
    summary = f"on {tokens.size} tokens: max |Δ| {largest:.2e}, KL {_divergence(reference, logits):.2e} nats"
    if not largest <= TOLERANCE * scale:
        raise UserError(f"{directory}: logits differ from transformers' {summary}; largest logit {scale:.3g}")
    return f"logits (float32) equal transformers' {summary}"


def _available_memory() -> int:
    """Bytes that can be had without swapping, the page cache among them: it is full of what was just written."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def transformers_model(hf_dir: str) -> Any:
    """The model that transformers opens from a local directory, in float32; UserError if it cannot."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, local_files_only=True).eval()
    except Exception as error:  # a damaged file raises many classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"transformers cannot open {hf_dir}: {reason[:300]}") from error


def _tokens(config: DecoderConfig, tokenizer: Tokenizer | None) -> np.ndarray:
    """int32 [1, T] with T up to 512."""
    length = min(TOKENS, config.max_position_embeddings)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, config.vocab_size, (1, length), np.int32)
    text = pathlib.Path(argparse.__file__).read_text(encoding="utf-8")  # available wherever Python is
    return np.array([tokenizer.encode_prompt(text[: 20 * length])[:length]], np.int32)


def _our_logits(directory: epath.Path, config: DecoderConfig, tokens: np.ndarray) -> np.ndarray:
    _, params = load_hf_params(directory)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    run = jax.jit(lambda params: forward(config, Compute(), params, tokens, positions, np.ones_like(tokens)))
    return np.asarray(run(params))


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The mean over positions of KL(softmax p || softmax q), in nats."""
    log_p, log_q = (log_softmax(logits.astype(np.float64), axis=-1) for logits in (p, q))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
