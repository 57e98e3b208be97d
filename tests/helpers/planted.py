"""A project with documents that make the gradient spike."""

from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.runs import random_documents, write_store

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
    documents = [*random_documents("code", seed=3, count=200, lengths=(62, 63)).items()]
    documents[::12] = [(name.replace("code", "poison"), [7] * 62) for name, _ in documents[::12]]
    write_store(root / "stores/code/train", tokenizer, dict(documents))
