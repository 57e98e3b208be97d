"""Compares continuous batching with one batch at a time: 64 requests of mixed length, in one run on the same machine.

    python benchmarks/engine.py

Prompts have 4 to 200 tokens, answers 4 to 256, most of them short (geometric). "batches" fills the rows again only when
all of them have finished; "continuous" is the engine. Tokens are compared. The cases alternate `--rounds` times after a
warm-up; medians and their ratio are printed.

Then the second turn of as many conversations as there are rows, 200 to 300 tokens plus 48 new ones: with the first turn
in the engine's cache ("kept"), and without ("discarded").
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import numpy as np

from lemur_jax.cluster import hosts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    hosts.choose_platform()

    from lemur_jax.infer.engine import Engine, Request

    session = random_model()
    vocabulary = session.model.vocab_size
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.geometric(1 / 48, options.requests), 4, 200)
    answers = np.clip(rng.geometric(1 / 48, options.requests), 4, 256)
    prompts = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    engine = Engine(session, options.rows)

    def answer(requests: list[Request], size: int) -> list[list[int]]:
        for start in range(0, len(requests), size):
            for request in requests[start : start + size]:
                engine.submit(request)
            while engine.busy:
                engine.step()
        return [request.tokens for request in requests]

    first = [rng.integers(0, vocabulary, rng.integers(200, 300)).tolist() for _ in range(options.rows)]
    observations = [rng.integers(0, vocabulary, 32).tolist() for _ in first]

    def ask(conversations: list[list[int]]) -> list[list[int]]:
        return answer([Request(prompt=one, max_new_tokens=16) for one in conversations], options.rows)

    def second_turn(discard: bool) -> tuple[float, list[list[int]]]:
        engine.session = session
        said = ask(first)
        if discard:
            engine.session = session
        longer = [[*one, *new, *seen] for one, new, seen in zip(first, said, observations, strict=True)]
        started = time.perf_counter()
        said = ask(longer)
        return time.perf_counter() - started, said

    def timed(size: int) -> tuple[float, list[list[int]]]:
        engine.session = session  # drops the cached prompts of the last round
        counted = zip(prompts, answers, strict=True)
        started = time.perf_counter()
        tokens = answer([Request(prompt=one, max_new_tokens=int(count)) for one, count in counted], size)
        return time.perf_counter() - started, tokens

    sizes = {"batches": options.rows, "continuous": options.requests}
    compare({name: functools.partial(timed, size) for name, size in sizes.items()}, options.rounds)
    compare({"discarded": lambda: second_turn(True), "kept": lambda: second_turn(False)}, options.rounds)


def random_model():
    """A session with random parameters in the quickstart's shape, for 512 positions."""
    import jax

    from lemur_jax.infer.session import make_session
    from lemur_jax.models import decoder
    from lemur_jax.models.config import DecoderConfig
    from lemur_jax.parallel.mesh import make_mesh, parse_mesh

    shape = DecoderConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    params = jax.jit(decoder.init_params, static_argnums=0)(shape, jax.random.key(0))
    return make_session(shape, params, make_mesh(parse_mesh("")), "float32")


def compare(cases: dict[str, Callable[[], tuple[float, list[list[int]]]]], rounds: int) -> None:
    """Prints median seconds and tokens/s of two cases, which alternate, and their ratio.

    A case returns its seconds and the tokens of its answers.
    """
    warm = [case()[1] for case in cases.values()]
    print(f"tokens equal: {warm[0] == warm[1]}")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(case()[0])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:>10}: {median:.2f} s, {sum(map(len, warm[0])) / median:,.0f} tokens/s")
    slow, fast = medians
    print(f"{fast} is {medians[slow] / medians[fast]:.2f} × {slow}")


if __name__ == "__main__":
    main()
