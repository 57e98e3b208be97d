"""What the paper published, and scores that come from other harnesses than ours."""

import math

from lemur_jax.common.errors import UserError

# Percent, from Table 3 of the paper (arXiv 2310.06830).
_PUBLISHED = {
    "Llama-2-70B": (68.9, 51.2, 56.8, 30.5, 45.4, 60.0, 24.4, 11.3),
    "Lemur-70B": (64.5, 51.6, 54.9, 35.4, 53.2, 62.8, 30.4, 30.7),
    "Lemur-70B-Chat": (65.3, 61.9, 66.3, 61.0, 55.5, 62.5, 42.9, 34.5),
}
_BENCHMARKS = ("MMLU", "BBH", "GSM8K", "HumanEval", "MBPP", "Spider", "MultiPL-E", "DS-1000")
PUBLISHED: dict[str, dict[str, float | None]] = {
    model: dict(zip(_BENCHMARKS, scores, strict=True)) for model, scores in _PUBLISHED.items()
}
# Benchmarks of the paper that have harnesses of their own; docs/evaluation.md has the commands whole.
ELSEWHERE = {
    "Spider": "bigcode-eval --task spider, then test-suite-sql-eval",
    "MultiPL-E": "bigcode-eval --task multiple-LANGUAGE",
    "DS-1000": "bigcode-eval --task ds1000-all-completion",
}


def parse_scores(text: str) -> dict[str, float]:
    """{"Spider": 62.8} of "Spider=62.8": what harnesses of their own have found.

    Raises:
      UserError: not such a text, or another benchmark.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, score = part.partition("=")
        try:
            found[name] = float(score)
        except ValueError:
            found[name] = math.nan
        if name not in ELSEWHERE or not 0 <= found[name] <= 100:
            raise UserError(
                f"cannot read the score {part!r}: write per cent of {', '.join(ELSEWHERE)}, e.g. Spider=62.8"
            )
    return found
