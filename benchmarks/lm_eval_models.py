"""Compares the model `lemur` of lm-evaluation-harness with the harness's `hf`, in one run on the same machine.

    python benchmarks/lm_eval_models.py --hf quickstart/hf/chat --checkpoint quickstart/runs/chat

Three kinds of requests about Python's documentation, float32: `choice` (questions of ~300 tokens with four options of
one token, as in MMLU), `options` (continuations of several tokens), `generate` (greedy, 32 tokens). `hf` runs with
each of `--batches`; its best result counts. The first call, which compiles, is reported separately from the medians of
`--rounds`. Results must agree: the largest difference is printed.
"""

import argparse
import pydoc_data.topics
import statistics
import time

from lemur_jax.cluster import hosts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--hf", required=True, help="the same model as a Hugging Face directory")
    parser.add_argument(
        "--documents", type=int, default=64, help="documents to make requests from, at most 150"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    hosts.choose_platform()

    from lm_eval.models.huggingface import HFLM

    from lemur_jax.evals.harness import LemurLM

    settings = {"dtype": "float32", "add_bos_token": False, "device": "cpu"}
    models = {"lemur": LemurLM(checkpoint=options.checkpoint)}
    models |= {f"hf, batch {b}": HFLM(options.hf, batch_size=b, **settings) for b in options.batches}
    for kind, requests in workload(options.documents).items():
        seconds, answers = {}, {}
        for name, model in models.items():
            run = model.generate_until if kind == "generate" else model.loglikelihood
            first, *rest = [timed(run, requests) for _ in range(1 + options.rounds)]
            seconds[name], answers[name] = statistics.median(took for took, _ in rest), first[1]
            rate = len(requests) / seconds[name]
            print(f"{kind:>9}  {name:<12} {rate:8.1f} requests/s, first call {first[0]:6.2f} s", flush=True)
        lemur, best = seconds.pop("lemur"), min(seconds.values())
        expected = answers[f"hf, batch {options.batches[0]}"]
        print(
            f"{kind:>9}  lemur is {best / lemur:.2f} × hf; {difference(answers['lemur'], expected)}",
            flush=True,
        )


def workload(documents: int) -> dict[str, list]:
    """Requests by kind."""
    from lm_eval.api.instance import Instance

    text = "\n".join(pydoc_data.topics.topics.values())
    pieces = [text[index * 3000 :][: 900 + 300 * index // documents] for index in range(documents)]
    choice = [(piece + "\nAnswer:", f" {letter}") for piece in pieces for letter in "ABCD"]
    several = [(piece[:-40], piece[-40:][: 10 * n]) for piece in pieces for n in (1, 2, 3, 4)]
    several = [pair for pair in several if pair[1].strip()]  # spaces alone are no continuation
    generate = [(piece, {"until": ["\n\n\n"], "max_gen_toks": 32, "do_sample": False}) for piece in pieces]
    kinds = {
        "choice": ("loglikelihood", choice),
        "options": ("loglikelihood", several),
        "generate": ("generate_until", generate),
    }
    return {
        name: [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]
        for name, (kind, arguments) in kinds.items()
    }


def timed(run, requests) -> tuple[float, list]:
    started = time.perf_counter()
    found = run(requests, disable_tqdm=True)
    return time.perf_counter() - started, found


def difference(found: list, expected: list) -> str:
    if isinstance(found[0], str):
        return f"{sum(a == b for a, b in zip(found, expected, strict=True))} of {len(found)} texts equal"
    largest = max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True))
    return f"log-likelihoods differ by at most {largest:.1e}"


if __name__ == "__main__":
    main()
