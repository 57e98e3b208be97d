"""Hugging Face checkpoints in and out: one table of names, read in opposite directions."""
