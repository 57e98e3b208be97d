"""From token stores to exact batches: store, rows, mixture, loader."""
