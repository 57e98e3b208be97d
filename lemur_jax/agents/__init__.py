"""Language agents: environments that answer, agents that act, episodes that are kept whole."""
