"""Compares prefill and decode with transformers.generate, in one run on the same machine.

    python benchmarks/generate.py --hf quickstart/hf/chat --checkpoint quickstart/runs/chat

Greedy, float32, a batch of equal prompts; both sides generate the same number of tokens without stopping. They
alternate `--rounds` times, after a warm-up of every shape; medians and their ratio are printed. Prefill is the time to
the first token.
"""

import argparse
import statistics
import time

import numpy as np

from lemur_jax.cluster import hosts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--hf", required=True, help="the same model as a Hugging Face directory")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    hosts.choose_platform()

    import torch
    from transformers import AutoModelForCausalLM

    from lemur_jax.infer.generate import generate
    from lemur_jax.infer.session import load
    from lemur_jax.parallel.mesh import parse_mesh

    session = load(options.checkpoint, parse_mesh(""), "float32")
    network = AutoModelForCausalLM.from_pretrained(options.hf, dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, session.model.vocab_size, (options.batch, options.prompt))

    def generate_lemur(count: int) -> list[list[int]]:
        found = generate(session, prompts.tolist(), max_new_tokens=count, stop_ids=())
        return [list(completion.tokens) for completion in found]

    def generate_transformers(count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, options.prompt :].tolist()

    same = generate_lemur(options.new) == generate_transformers(options.new)
    print(f"greedy tokens equal: {same}")
    seconds: dict[tuple[str, int], list[float]] = {}
    for count in (1, options.new):
        generate_lemur(count)
        generate_transformers(count)
        for _ in range(options.rounds):
            for name, run in (("lemur_jax", generate_lemur), ("transformers", generate_transformers)):
                started = time.perf_counter()
                run(count)
                seconds.setdefault((name, count), []).append(time.perf_counter() - started)
    speeds = {}
    for name in ("lemur_jax", "transformers"):
        first = statistics.median(seconds[name, 1])
        rest = statistics.median(seconds[name, options.new]) - first
        speeds[name] = (options.batch * options.prompt / first, options.batch * (options.new - 1) / rest)
        print(f"{name:>13}: prefill {speeds[name][0]:,.0f} tokens/s, decode {speeds[name][1]:,.0f} tokens/s")
    prefill, decode = (a / b for a, b in zip(speeds["lemur_jax"], speeds["transformers"], strict=True))
    print(f"lemur_jax is {prefill:.2f} × transformers in prefill, {decode:.2f} × in decode")


if __name__ == "__main__":
    main()
