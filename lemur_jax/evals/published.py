"""What the paper published, and scores that come from other harnesses than ours."""

import math
from collections.abc import Mapping

from lemur_jax.common.errors import UserError

# Per cent; Table 3 of the paper (arXiv 2310.06830).
_BENCHMARKS = ("MMLU", "BBH", "GSM8K", "HumanEval", "MBPP", "Spider", "MultiPL-E", "DS-1000")
_TABLE_3 = {
    "StarCoder-15B": (30.8, 33.2, 8.9, 33.6, 52.7, 58.3, 25.3, 26.0),
    "StarCoderPlus-15B": (42.0, 36.2, 17.7, 26.2, 37.0, 48.8, 21.4, 19.4),
    "CodeLlama-34B": (52.8, 42.2, 32.7, 48.8, 55.0, 68.4, 36.4, 31.8),
    "Llama-2-70B": (68.9, 51.2, 56.8, 30.5, 45.4, 60.0, 24.4, 11.3),
    "Lemur-70B": (64.5, 51.6, 54.9, 35.4, 53.2, 62.8, 30.4, 30.7),
    "WizardCoder-15B": (29.4, 28.8, 7.1, 57.3, 51.6, 61.6, 30.8, 29.2),
    "CodeLlama-34B-INST": (53.5, 37.1, 41.0, 41.5, 57.0, 66.6, 36.1, 32.3),
    "Llama-2-70B-Chat": (63.9, 38.9, 48.7, 31.1, 38.2, 60.3, 22.6, 17.8),
    "Lemur-70B-Chat": (65.3, 61.9, 66.3, 61.0, 55.5, 62.5, 42.9, 34.5),
}
# Success in per cent; Tables 4 to 7 of the paper. IC: InterCode; the other rows down to ALFWorld's are MINT's.
AGENT_MODELS = ("Llama-2-70B-Chat", "CodeLlama-34B-INST", "Lemur-70B-Chat", "gpt-3.5-turbo", "gpt-4")
_AGENT_ROWS = {
    "M-GSM8K": (33.33, 25.00, 58.33, 43.75, 93.75),
    "M-MATH": (3.00, 4.00, 6.00, 26.00, 57.00),
    "M-TheoremQA": (2.04, 2.04, 8.16, 28.57, 57.14),
    "M-HotpotQA": (27.91, 16.28, 44.19, 27.91, 46.51),
    "M-MMLU": (42.11, 30.26, 56.58, 56.58, 80.26),
    "M-HumanEval": (8.89, 2.22, 46.67, 37.78, 73.33),
    "M-MBPP": (8.79, 2.20, 17.58, 25.27, 52.75),
    "IC-Bash": (31.50, 36.00, 34.50, 46.51, 48.52),
    "IC-SQL": (67.89, 67.79, 73.79, 72.82, 84.41),
    "RoboCodeGen": (48.65, 64.86, 75.68, 83.78, 83.78),
    "IC-CTF": (9.00, 16.00, 22.00, 11.00, 37.00),
    "WebArena": (1.72, 4.06, 5.30, 7.38, 10.59),
    "M-ALFWorld": (21.64, 37.31, 59.70, 41.79, 84.33),
}
# With gpt-4's feedback (Table 6): counted in the recorded run of Lemur-70B-Chat, not taken from the paper.
_FEEDBACK_ROWS = {
    "M-GSM8K": 68.75,
    "M-MATH": 18.00,
    "M-TheoremQA": 26.53,
    "M-HotpotQA": 32.56,
    "M-MMLU": 32.89,
    "M-HumanEval": 68.89,
    "M-MBPP": 32.97,
    "M-ALFWorld": 68.66,
}
AGENTS: dict[str, dict[str, float]] = {
    name: dict(zip(AGENT_MODELS, scores, strict=True)) for name, scores in _AGENT_ROWS.items()
} | {f"{name}, feedback": {"Lemur-70B-Chat": score} for name, score in _FEEDBACK_ROWS.items()}
PUBLISHED: dict[str, dict[str, float | None]] = {
    model: dict(zip(_BENCHMARKS, scores, strict=True)) for model, scores in _TABLE_3.items()
}
# Benchmarks of the paper that have harnesses of their own; docs/evaluation.md has the full commands.
ELSEWHERE = {
    "Spider": "bigcode-eval --task spider, then test-suite-sql-eval",
    "MultiPL-E": "bigcode-eval --task multiple-LANGUAGE",
    "DS-1000": "bigcode-eval --task ds1000-all-completion",
}


def parse_scores(text: str) -> dict[str, float]:
    """Scores of other harnesses, e.g. "Spider=62.8" as {"Spider": 62.8}.

    Raises:
      UserError: not such a text, or another benchmark.
    """
    scores = {}
    for item in filter(None, text.split(",")):
        name, _, score = item.partition("=")
        try:
            scores[name] = float(score)
        except ValueError:
            scores[name] = math.nan
        if name not in ELSEWHERE or not 0 <= scores[name] <= 100:
            raise UserError(
                f"cannot read the score {item!r}: write per cent of {', '.join(ELSEWHERE)}, e.g. Spider=62.8"
            )
    return scores


def agents_table(scores: Mapping[str, float], name: str) -> list[list[str]]:
    """The head and rows of Tables 4 to 7, ours in the last column, in per cent."""
    rows = [["success, %", *AGENT_MODELS, name]]
    for row, score in scores.items():
        published = [f"{AGENTS[row][model]:.2f}" if model in AGENTS[row] else "–" for model in AGENT_MODELS]
        rows.append([row, *published, f"{score:.2f}"])
    return rows


def format_agents(scores: Mapping[str, float], name: str) -> str:
    """`agents_table` as text."""
    width = max(20, len(name) + 2)
    return "\n".join(
        f"{row:<22}{''.join(f'{cell:>20}' for cell in cells)}{score:>{width}}"
        for row, *cells, score in agents_table(scores, name)
    )
