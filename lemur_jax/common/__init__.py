"""Shared by all packages, without JAX at import: errors, config sections, logging, paths, progress, the hub."""
