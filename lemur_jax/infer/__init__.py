"""Inference on the training mesh: prefill and decode, sampling, streaming, chat."""
