"""Language agents: the sandbox, programming problems, environments, episodes with full traces."""
