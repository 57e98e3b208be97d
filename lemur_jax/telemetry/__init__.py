"""Monitoring of a run: the metrics file, progress in the terminal, model FLOPs and MFU. No JAX at import."""
