"""A project with documents that make the gradient spike."""

import numpy as np

from lemur_jax.data.manifest import empty_manifest
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text.tokenizer import Tokenizer

OPTIONS = """
    config.spikes.factor = 2.0
    config.spikes.window = 4
    config.spikes.rollback_after = 2
    config.spikes.max_rollbacks = 10
    return config
"""


def plant(root):
    """Writes `stores/code/train` below root with one document in 12 poisoned, and turns the rule on.

    More of them would be in most batches, and the median of the norms would be theirs.
    """
    config = (root / "config.py").read_text()
    (root / "config.py").write_text(config.replace("\n    return config\n", OPTIONS))
    tokenizer = Tokenizer.load(root / "tokenizer")
    rng = np.random.default_rng(3)
    about = dict(task="code", split="train", source="code", vocab_size=tokenizer.vocab_size)
    about |= dict(tokenizer_digest=tokenizer.digest, added_tokens=tokenizer.added_tokens)
    with StoreWriter(root / "stores/code/train", empty_manifest(**about)) as writer:
        for number in range(200):
            poison = number % 12 == 0
            ids = [7] * 62 if poison else rng.integers(3, tokenizer.vocab_size, 62).tolist()
            name = f"{'poison' if poison else 'code'}-{number}"
            writer.add([tokenizer.bos_id, *ids, tokenizer.eos_id], name, 3 * len(ids))
