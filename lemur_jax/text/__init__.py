"""Tokenizers, chat templates and conversations."""
