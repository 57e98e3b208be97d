"""Reports of runs: one self-contained HTML page, and a table of held-out bits per byte."""

from lemur_jax.report.page import write_report
from lemur_jax.report.tables import bits_per_byte_table

__all__ = ["bits_per_byte_table", "write_report"]
