"""What the runs came to: one self-contained HTML page, and a table of held-out bits per byte."""

from lemur_jax.report.page import bits_per_byte_table, report

__all__ = ["bits_per_byte_table", "report"]
