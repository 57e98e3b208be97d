"""Tokens and epochs that a run needs of each source, compared with those available and allowed."""

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction

from lemur_jax.common.errors import UserError
from lemur_jax.data.mixture import Mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceBudget:
    """What a run needs of one source."""

    name: str
    rows_required: int  # read in the whole run
    rows_available: int  # of one epoch
    tokens_required: int  # the same in real (not padding) positions
    tokens_available: int
    max_epochs: float  # the cap; 0: none
    # its part of the tokens of each stage that the run reaches, by the stage's label
    shares: Mapping[str, float]

    @property
    def epochs(self) -> float:
        return self.rows_required / self.rows_available

    @property
    def exceeded(self) -> bool:
        return bool(self.max_epochs) and self.rows_required > Fraction(self.max_epochs) * self.rows_available


def budget(mixture: Mixture, steps: int) -> list[SourceBudget]:
    """What a run of `steps` updates needs of each source."""
    rows = mixture.rows_before(steps * mixture.batch_rows)
    stages = [(name, stage.step) for name, stage in mixture.stages if stage.step < steps]
    stops = [*(start for _, start in stages[1:]), steps]
    shares = {
        f"{name}, step {start:,} on": _token_shares(mixture, start, stop)
        for (name, start), stop in zip(stages, stops, strict=True)
    }
    return [
        SourceBudget(
            name=source.name,
            rows_required=rows[index],
            rows_available=len(source.rows),
            tokens_required=rows[index] * source.rows.num_tokens // len(source.rows),
            tokens_available=source.rows.num_tokens,
            max_epochs=source.max_epochs,
            shares={label: by_source[index] for label, by_source in shares.items()},
        )
        for index, source in enumerate(mixture.sources)
    ]


def _token_shares(mixture: Mixture, start: int, stop: int) -> list[float]:
    """The share of each source in the tokens of updates [start, stop)."""
    start_rows, stop_rows = (mixture.rows_before(step * mixture.batch_rows) for step in (start, stop))
    tokens = [
        (stop_row - start_row) * source.rows.num_tokens / len(source.rows)
        for start_row, stop_row, source in zip(start_rows, stop_rows, mixture.sources, strict=True)
    ]
    return [count / sum(tokens) for count in tokens]


def check_budget(needs: Sequence[SourceBudget]) -> None:
    """Raises UserError if a source would be repeated more often than it may be."""
    for need in needs:
        if need.exceeded:
            raise UserError(
                f"source {need.name}: the run needs {need.tokens_required:,} tokens, {need.epochs:.2f} epochs"
                f" of its {need.tokens_available:,}, and data.sources.{need.name}.max_epochs is"
                f" {need.max_epochs:g}: raise that (0: no limit), lower the share or train.steps, or prepare"
                " more data"
            )


def format_budget(needs: Sequence[SourceBudget]) -> str:
    """The budget as a table; with several stages also the shares in each."""
    total = sum(need.tokens_required for need in needs)
    stages = list(needs[0].shares) if len(needs[0].shares) > 1 else []
    lines = [("source", *stages, "share", "tokens wanted", "available", "epochs", "allowed")]
    for need in needs:
        lines.append(
            (
                need.name,
                *(f"{need.shares[stage]:.2%}" for stage in stages),
                f"{need.tokens_required / max(total, 1):.2%}",
                f"{need.tokens_required:,}",
                f"{need.tokens_available:,}",
                f"{need.epochs:.2f}",
                (f"{need.max_epochs:g}" if need.max_epochs else "any") + (" !" if need.exceeded else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in line)
        for line in (enumerate(zip(cells, widths, strict=True)) for cells in lines)
    )
