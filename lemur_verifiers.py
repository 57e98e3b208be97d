"""The plugin `lemur-verifiers` of the `verifiers` library: `vf-eval lemur-verifiers`; see docs/agents.md."""

from lemur_jax.agents.verifiers_adapter import LemurEnv, LemurHarness, LemurTaskset

__all__ = ["LemurEnv", "LemurHarness", "LemurTaskset"]
