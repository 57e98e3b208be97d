"""Evaluation: benchmarks through the harness, code in a sandbox, agents in environments."""
