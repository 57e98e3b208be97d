"""Reinforcement learning: episodes of the policy in environments, advantages, and the policy objective."""
