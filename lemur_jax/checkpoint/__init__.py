"""Self-describing checkpoints, through Orbax."""
