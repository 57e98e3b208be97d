"""A base checkpoint, two corpora that share no token, and a config: what a sweep needs."""

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.manager import make_metadata, write_params
from lemur_jax.data.manifest import empty_manifest
from lemur_jax.models import decoder
from lemur_jax.models.presets import preset
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import train_sentencepiece

CONFIG = """
from lemur_jax.config import default_config
from lemur_jax.models.presets import preset

def get_config(arg=""):
    config = default_config(preset("tiny", vocab_size=300))
    config.compute.dtype = "float32"
    config.init.checkpoint = "base"
    config.tokenizer.path = "tokenizer"
    config.data.stores = "stores"
    config.data.sequence_length = 64
    config.data.sources = {
        "code": {"share": 10.0, "packing": "concat", "max_epochs": 0.0},
        "text": {"share": 1.0, "packing": "concat", "max_epochs": 0.0},
    }
    config.train.steps = 6
    config.train.batch_rows = 8
    config.optimizer.learning_rate = 1e-2
    config.eval.tasks = ("code", "text")
    config.log.every_steps = 2
    if arg == "languages":
        config.data.sources = {
            name: {"share": share, "packing": "concat", "max_epochs": 0.0}
            for name, share in (("code/C++", 3.0), ("code/Java", 1.0), ("web", 1.0))
        }
    return config
"""


def write_store(path, tokenizer, task, split, ids):
    rng = np.random.default_rng(len(f"{task} {split}"))
    digests = {"tokenizer_digest": tokenizer.digest, "added_tokens": tokenizer.added_tokens}
    options = {"task": task, "split": split, "source": task, "vocab_size": tokenizer.vocab_size}
    with StoreWriter(path, empty_manifest(**options, **digests)) as writer:
        for number in range(40):
            tokens = rng.choice(ids, rng.integers(20, 120)).tolist()
            writer.add([tokenizer.bos_id, *tokens, tokenizer.eos_id], f"{task}-{number}", 3 * len(tokens))


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    (root / "config.py").write_text(CONFIG)
    words = [f"value_{i} = {i} + other_{i % 7}" for i in range(400)]
    train_sentencepiece(words, root / "tokenizer", vocab_size=300)
    tokenizer = Tokenizer.load(root / "tokenizer")
    for task, ids in (("code", range(10, 40)), ("text", range(150, 180))):
        for split in ("train", "validation"):
            write_store(root / "stores" / task / split, tokenizer, task, split, np.array(ids))
    model = preset("tiny", vocab_size=300)
    params = jax.jit(decoder.init_params, static_argnums=0)(model, jax.random.key(0))
    metadata = make_metadata(model=model.to_dict(), tokenizer_files=tokenizer.files())
    write_params(root / "base", params, metadata)
    return root
