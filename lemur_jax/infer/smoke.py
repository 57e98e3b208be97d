"""The smoke test that a slice runs before anything else: load, generate, compare, time."""

import dataclasses
import importlib.util
import json
import time

import jax
import numpy as np
from etils import epath

from lemur_jax.cluster.hosts import inform
from lemur_jax.common.errors import UserError
from lemur_jax.convert.hf_config import read_config
from lemur_jax.convert.hf_weights import holds_weights
from lemur_jax.convert.verify import transformers_model
from lemur_jax.infer.generate import generate
from lemur_jax.infer.score import score
from lemur_jax.infer.session import Session
from lemur_jax.text.tokenizer import Tokenizer

NEW_TOKENS = 48

# Largest difference of a log-probability from a stored one, in nats: meshes round differently. Of two tokens that
# differ by no more, either may come first.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}

# Prompts of different lengths: a ragged batch.
PROMPTS = (
    "def",
    "import os\n\nclass Path:\n    def __init__(self, name):\n        self.name = name\n",
    "The with statement is used to wrap the execution of a block with methods defined by a context manager.",
    "for i in range(10):",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Greedy answers of a trusted machine and how they were computed, for others to compare with.

    Attributes:
      dtype, weights: of the session, e.g. "float32" and "int8".
      prompts: ids.
      tokens: ids that followed each prompt.
      logprobs: of these tokens, in nats.
    """

    dtype: str
    weights: str
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


def read_reference(path: epath.PathLike) -> Reference:
    """A reference from its file, local or gs://.

    Raises:
      UserError: no such file, or not a reference.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"no reference {path}: make one with --write-reference where results are trusted")
    try:
        return Reference(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no reference of lemur smoke, write a new one: {error}") from error


def write_reference(path: epath.PathLike, reference: Reference) -> None:
    """Writes the file, local or gs://."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(reference)) + "\n")


def smoke(session: Session, hf_dir: str = "", reference: Reference | None = None) -> Reference:
    """Generates greedily on the session's mesh, compares, and logs the findings.

    The first run compiles, the second is timed; both must give the same tokens.

    Args:
      session: a loaded model with its tokenizer.
      hf_dir: the same model as a Hugging Face directory, whose tokens from transformers are compared; "": none.
      reference: what an earlier run returned, on any mesh; tokens and log-probabilities are compared. It has passed
        `check_reference`.

    Returns:
      What was generated.

    Raises:
      UserError: tokens differ from one run to the next, from transformers' or from the reference.
    """
    prompts = _prompts(session.need_tokenizer())
    first_run = generate(session, prompts, max_new_tokens=NEW_TOKENS, stop_ids=())
    started = time.perf_counter()
    second_run = generate(session, prompts, max_new_tokens=NEW_TOKENS, stop_ids=())
    seconds = time.perf_counter() - started
    if [completion.tokens for completion in first_run] != [completion.tokens for completion in second_run]:
        raise UserError(
            "smoke test failed: two greedy runs gave different tokens on this mesh; check the devices"
        )
    axes = [f"{axis} {size}" for axis, size in session.mesh.shape.items() if size > 1]
    inform(
        f"{len(prompts)} prompts × {NEW_TOKENS} tokens on {session.mesh.size} {jax.devices()[0].platform} devices"
        f" ({' × '.join(axes) or 'one device'}): {len(prompts) * NEW_TOKENS / seconds:,.0f} tokens/s,"
        f" {_memory(session)}"
    )
    result = Reference(
        dtype=session.compute.dtype,
        weights=session.weights,
        prompts=prompts,
        tokens=[list(completion.tokens) for completion in first_run],
        logprobs=[list(completion.logprobs) for completion in first_run],
    )
    if reference:
        inform(_compare_reference(session, reference, result))
    if hf_dir:
        inform(_compare_transformers(hf_dir, result))
    return result


def check_hf(hf_dir: str, dtype: str, weights: str) -> None:
    """Raises UserError if a run cannot be compared: no transformers, no model in the directory, or not float32."""
    missing = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--hf needs {' and '.join(missing)}: pip install 'lemur_jax[verify]', or leave out --hf"
        )
    read_config(hf_dir)
    if not holds_weights(hf_dir):
        raise UserError(f"--hf {hf_dir} holds no weights: name the directory that lemur export-hf has made")
    if (dtype, weights) != ("float32", "float"):
        raise UserError(
            f"--hf compares with transformers in float32, this run has --dtype {dtype} --weights {weights}: leave both"
            " out, or leave out --hf"
        )


def check_reference(stored: Reference, dtype: str, weights: str, tokenizer: Tokenizer) -> None:
    """Raises UserError if the reference is of another dtype, kind of weights, tokenizer or version."""
    if (stored.dtype, stored.weights) != (dtype, weights):
        raise UserError(
            f"the reference was made with --dtype {stored.dtype} --weights {stored.weights}, this run has --dtype"
            f" {dtype} --weights {weights}: choose the same, or make another reference"
        )
    if stored.prompts != _prompts(tokenizer):
        raise UserError("the reference is of other prompts or another tokenizer: make a new one")
    lengths = [[len(row) for row in rows] for rows in (stored.tokens, stored.logprobs)]
    if lengths != [[NEW_TOKENS] * len(PROMPTS)] * 2:
        raise UserError(
            f"the reference does not have {NEW_TOKENS} tokens with log-probabilities after each of {len(PROMPTS)}"
            " prompts: make a new one"
        )


def _prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]


def _first_difference(mine: list[int], other: list[int]) -> int:
    return next(index for index, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)


def _compare_reference(session: Session, stored: Reference, ours: Reference) -> str:
    """Compares with what an earlier run generated, and says how near it is.

    After the first different token the texts diverge, so the stored text is scored here: each token must be as likely
    as it was, and the first different one about as likely as ours.
    """
    tolerance, ties, logprobs = TOLERANCE[ours.dtype], [], ours.logprobs
    if ours.tokens != stored.tokens:
        scores = score(session, list(zip(stored.prompts, stored.tokens, strict=True)))
        logprobs = [list(item.logprobs) for item in scores]
    for row, (prompt, mine, theirs) in enumerate(zip(PROMPTS, ours.tokens, stored.tokens, strict=True)):
        if mine == theirs:
            continue
        at = _first_difference(mine, theirs)
        gap = ours.logprobs[row][at] - logprobs[row][at]
        message = (
            f"after {prompt[:20]!r} the token at position {at} is {mine[at]}, the reference has {theirs[at]}"
        )
        if not gap <= tolerance:
            raise UserError(f"smoke test failed: {message}, which is less likely here by {gap:.2g} nats")
        ties.append(f"; {message}: a tie, {gap:.1e} nats apart")
    difference = np.abs(np.array(logprobs) - np.array(stored.logprobs)).max()
    if not difference <= tolerance:
        raise UserError(
            f"smoke test failed: log-probabilities differ by up to {difference:.2g} nats from the reference's, more"
            f" than {tolerance:g}"
        )
    count = sum(map(len, ours.tokens))
    summary = f"all {count} tokens equal the reference's"
    if ties:
        summary = f"the reference's {count} tokens are likely here"
    return f"{summary}, log-probabilities within {difference:.1e} nats{''.join(ties)}"


def _compare_transformers(hf_dir: str, ours: Reference) -> str:
    """Compares with the greedy tokens of transformers in float32, one prompt at a time."""
    import torch

    model = transformers_model(hf_dir)
    for text, prompt, mine in zip(PROMPTS, ours.prompts, ours.tokens, strict=True):
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            # Neither side stops early: every position is compared.
            eos_token_id=None,
            pad_token_id=0,
        )
        theirs = np.asarray(output[0, len(prompt) :]).tolist()
        if mine != theirs:
            at = _first_difference(mine, theirs)
            raise UserError(
                f"smoke test failed: after {text[:20]!r} the token at position {at} is {mine[at]}, transformers' on"
                f" {hf_dir} is {theirs[at]}"
            )
    return f"all {sum(map(len, ours.tokens))} greedy tokens equal transformers' on {hf_dir}"


def _memory(session: Session) -> str:
    """The largest share of the parameters that one device holds, and the peak memory where the device reports it."""
    by_device: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(session.params):
        for shard in leaf.addressable_shards:
            by_device[shard.device] = by_device.get(shard.device, 0) + shard.data.nbytes
    text = f"{max(by_device.values()) / 2**20:,.1f} MiB of parameters a device"
    stats = jax.local_devices()[0].memory_stats() or {}
    if stats.keys() >= {"peak_bytes_in_use", "bytes_limit"}:  # a CPU does not report them
        peak, limit = (stats[key] / 2**30 for key in ("peak_bytes_in_use", "bytes_limit"))
        text += f", at most {peak:,.2f} GiB in use of {limit:,.2f}"
    return text
