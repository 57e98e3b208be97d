"""Benchmarks: HumanEval and MBPP, lm-evaluation-harness, the paper's suite."""
