"""From seqio tasks to exact batches: tokenizer, chat, token stores, rows, mixture, loader."""
