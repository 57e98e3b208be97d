"""Checkpoints that say everything about themselves, through Orbax."""
