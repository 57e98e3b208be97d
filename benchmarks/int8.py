"""Compares int8 with float weights of one checkpoint: perplexity, memory and speed.

    python benchmarks/int8.py --checkpoint quickstart/runs/chat --text FILE

Perplexity per token over `--windows` windows of `--tokens` tokens.
"""

import argparse
import math
import pathlib
import time

import numpy as np

from lemur_jax.cluster import hosts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--text", required=True, help="a text outside the training data")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    hosts.choose_platform()

    import jax

    from lemur_jax.infer.generate import generate
    from lemur_jax.infer.score import score
    from lemur_jax.infer.session import load
    from lemur_jax.parallel.mesh import parse_mesh

    for weights in ("float", "int8"):
        session = load(options.checkpoint, parse_mesh(""), options.dtype, weights=weights)
        tokenizer = session.need_tokenizer()
        ids = tokenizer.encode(pathlib.Path(options.text).read_text(encoding="utf-8"))
        count = min(options.windows, len(ids) // options.tokens)
        windows = np.array(ids[: count * options.tokens]).reshape(count, -1).tolist()
        scores = score(session, [([tokenizer.bos_id], window) for window in windows])
        nats = -np.mean([logprob for found in scores for logprob in found.logprobs])
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(session.params))
        prompts = [window[:32] for window in windows[:8]]
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            generate(session, prompts, max_new_tokens=64, stop_ids=())
        speed = 64 * len(prompts) / (time.perf_counter() - started)
        print(
            f"{weights:6} perplexity {math.exp(nats):9.3f} ({nats:.4f} nats) on {count * options.tokens:,} tokens,"
            f" {size / 2**20:,.1f} MiB of parameters, {speed:,.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
