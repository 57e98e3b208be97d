"""lemur_jax: code-heavy pretraining, chat tuning and export of Llama models on TPU pods."""

__version__ = "0.1.0"
