"""One training step against transformers on torch, in one run on the same machine.

    python benchmarks/train_step.py                     # CPU: 4 layers, width 256, T 512, batch 8, float32
    python benchmarks/train_step.py --preset llama3.2_1b --batch 4 --length 4096 --dtype bfloat16   # a GPU

Both sides take the same batch through forward, backward, clipping and AdamW. Each is timed for `--rounds` rounds of
`--steps` steps in turn, after a warm-up; the medians and their ratio are printed. Needs torch and transformers.
"""

import argparse
import statistics
import time

import numpy as np

from lemur_jax.common.config import default_config
from lemur_jax.models.presets import preset
from lemur_jax.parallel import hosts

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


def ours(model, batch_rows, length, dtype, remat, tokens):
    """(step function without arguments, seconds from building to the first step done)."""
    import jax

    from lemur_jax.models import llama
    from lemur_jax.parallel.mesh import make_mesh
    from lemur_jax.train.state import shardings_of, start
    from lemur_jax.train.step import build

    started = time.perf_counter()
    config = default_config(model.to_dict())
    config.compute.dtype, config.compute.remat = dtype, remat
    config.data.sequence_length, config.train.batch_rows = length, batch_rows
    program = build(config, make_mesh(config.mesh), num_sources=1)
    init = jax.jit(
        lambda key: llama.init_params(model, key), out_shardings=shardings_of(program.state.params)
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


def theirs(model, batch_rows, length, dtype, tokens):
    """The same for transformers with SDPA; torch.compile on a GPU, where it pays."""
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


def main() -> None:
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
    options = parser.parse_args()
    hosts.choose_platform()

    model = preset(options.preset) if options.preset else preset("tiny", **CPU_MODEL)
    if options.layers:
        model = preset(
            options.preset or "tiny",
            **({} if options.preset else CPU_MODEL),
            num_hidden_layers=options.layers,
        )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (options.batch, options.length + 1)).astype(np.int32)
    run_ours, first = ours(model, options.batch, options.length, options.dtype, options.remat, tokens)
    run_theirs = theirs(model, options.batch, options.length, options.dtype, tokens)

    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(options.rounds):
        for name, run in (("ours", run_ours), ("transformers", run_theirs)):
            started = time.perf_counter()
            run(options.steps)
            seconds[name].append((time.perf_counter() - started) / options.steps)
    for name, found in seconds.items():
        tokens_per_second = options.batch * options.length / statistics.median(found)
        spread = f"{min(found):.3f} to {max(found):.3f}"
        print(
            f"{name:>13}: {statistics.median(found):.3f} s a step ({spread}), {tokens_per_second:,.0f} tokens/s"
        )
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    print(
        f"ours is {statistics.median(ratios):.2f} × transformers' speed; building to first step took {first:.1f} s"
    )


if __name__ == "__main__":
    main()
