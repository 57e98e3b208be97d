"""From seqio tasks and files to token stores."""
