"""Compares a training step with transformers on torch, in one run on the same machine.

    python benchmarks/train_step.py                 # CPU: 4 layers, width 256, T 512, batch 8, float32
    python benchmarks/train_step.py --preset llama3.2_1b --batch 4 --length 4096 --dtype bfloat16 --apart    # a GPU
    python benchmarks/train_step.py --preset llama2_7b --batch 2 --length 4096 --dtype bfloat16 --remat mlp --apart

Both sides run forward, backward, clipping and AdamW on the same batch with float32 parameters and moments, for
`--rounds` rounds of `--steps` steps after a warm-up. They alternate, or with `--apart` each runs in its own process, so
that it has the whole GPU. Prints medians and their ratio, and with `--apart` the MFU relative to the fastest bfloat16
matmul measured on the machine. On a GPU transformers runs under torch.compile
with SDPA. Llama-2-7B takes 16 bytes a parameter, 108 GB: `--layers 16` fits 80 GB. Needs torch and transformers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from lemur_jax.cluster import hosts
from lemur_jax.config import RunConfig, replace
from lemur_jax.models.presets import preset
from lemur_jax.telemetry.flops import flops_per_token

CPU_MODEL = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
)


def lemur_steps(model, batch_rows, length, dtype, remat, tokens):
    """(function that makes a given number of steps, seconds from importing JAX to the end of the first step)."""
    started = time.perf_counter()
    import jax

    from lemur_jax.models import decoder
    from lemur_jax.parallel.mesh import make_mesh
    from lemur_jax.train.state import shardings_of, start
    from lemur_jax.train.step import build

    options = {"compute.dtype": dtype, "compute.remat": remat}
    options |= {"data.sequence_length": length, "train.batch_rows": batch_rows}
    config = replace(RunConfig(model=model), options)
    program = build(config, make_mesh(config.mesh), num_sources=1)
    init = jax.jit(
        lambda key: decoder.init_params(model, key), out_shardings=shardings_of(program.state.params)
    )
    state = start(init(jax.random.key(0)), program.optimizer, program.state)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((batch_rows, length), np.float32),
        "segment_ids": np.ones((batch_rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch_rows, 1)),
        "source_ids": np.zeros(batch_rows, np.int32),
    }
    batch = {key: jax.device_put(value, program.batch[key].sharding) for key, value in batch.items()}

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = program.step(state, batch)
        return float(metrics["loss"])

    run(1)
    return run, time.perf_counter() - started


def transformers_steps(model, dtype, tokens):
    """The same for transformers with SDPA; torch.compile on a GPU only, where it helps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = LlamaForCausalLM(
        LlamaConfig(
            **{key: getattr(model, key) for key in CPU_MODEL},
            rms_norm_eps=model.rms_norm_eps,
            tie_word_embeddings=model.tie_word_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = torch.tensor(tokens, device=device, dtype=torch.long)
    forward = torch.compile(network) if device == "cuda" else network

    def run(steps: int) -> float:
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = forward(ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    run(1)
    return run


def matmul_peak(size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of the fastest of several bfloat16 products of square matrices."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="", help="model; default: the CPU benchmark's")
    parser.add_argument("--layers", type=int, default=0, help="other number of layers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--apart", action="store_true", help="each side in its own process, and MFU")
    parser.add_argument("--matmul", type=int, default=8192, help="side of the matrices of --apart's peak")
    parser.add_argument("--side", default="", choices=("", *SIDES), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


SIDES = ("lemur_jax", "transformers")


def make(side: str, options: argparse.Namespace) -> tuple[Callable[[int], float], float]:
    """(function of a number of steps that returns the loss, seconds from importing to the end of the first step)."""
    model = model_of(options)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (options.batch, options.length + 1)).astype(np.int32)
    if side == "lemur_jax":
        return lemur_steps(model, options.batch, options.length, options.dtype, options.remat, tokens)
    started = time.perf_counter()
    return transformers_steps(model, options.dtype, tokens), time.perf_counter() - started


def model_of(options: argparse.Namespace):
    fields = {} if options.preset else CPU_MODEL
    if options.layers:
        fields = {**fields, "num_hidden_layers": options.layers}
    return preset(options.preset or "tiny", **fields)


def timed(run: Callable[[int], float], steps: int) -> float:
    """Seconds per step."""
    started = time.perf_counter()
    run(steps)
    return (time.perf_counter() - started) / steps


def alone(options: argparse.Namespace) -> dict:
    """Results of one side in a process of its own."""
    run, first = make(options.side, options)
    found = {
        "first": first,
        "seconds": [timed(run, options.steps) for _ in range(options.rounds)],
        "loss": run(1),
    }
    return found | ({"peak": matmul_peak(options.matmul)} if options.side == "lemur_jax" else {})


def in_turn(options: argparse.Namespace) -> dict[str, dict]:
    made = {side: make(side, options) for side in SIDES}
    found: dict[str, dict] = {side: {"first": made[side][1], "seconds": []} for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            found[side]["seconds"].append(timed(made[side][0], options.steps))
    for side in SIDES:
        found[side]["loss"] = made[side][0](1)
    return found


def apart(arguments: Sequence[str]) -> dict[str, dict]:
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, *arguments, "--side", side]
        found[side] = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]
        )
    return found


def report(options: argparse.Namespace, found: dict[str, dict]) -> None:
    tokens = options.batch * options.length
    for side in SIDES:
        seconds = found[side]["seconds"]
        rate = tokens / statistics.median(seconds)
        line = f"{side:>13}: {statistics.median(seconds):.3f} s per step ({min(seconds):.3f} to {max(seconds):.3f}),"
        line += f" {rate:,.0f} tokens/s, loss {found[side]['loss']:.3f}"
        if options.apart:
            work = flops_per_token(model_of(options), options.length, causal=True).total * rate
            line += f", {work / found['lemur_jax']['peak']:.1%} of the measured matmul peak"
        print(line)
    ratios = [
        b / a for a, b in zip(found["lemur_jax"]["seconds"], found["transformers"]["seconds"], strict=True)
    ]
    print(
        f"lemur_jax has {statistics.median(ratios):.2f} × transformers' speed; from import to the end of the first"
        f" step: {found['lemur_jax']['first']:.1f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if options.apart and not options.side:
        report(options, apart(sys.argv[1:] if arguments is None else arguments))
        return
    hosts.choose_platform()
    if options.side:
        print(json.dumps(alone(options)))
    else:
        report(options, in_turn(options))


if __name__ == "__main__":
    main()
