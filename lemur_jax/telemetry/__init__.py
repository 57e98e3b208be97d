"""How a run is: the metrics file, progress in the terminal, model FLOPs and MFU. No JAX at import."""
