"""A base checkpoint, two corpora that share no token, and a config: what a sweep needs."""

import pytest

from lemur_jax.models.presets import preset
from tests.helpers.runs import make_project, write_model

CHANGES = """
    config.model.vocab_size = 300
    config.init.checkpoint = "base"
    config.train.steps = 6
    config.eval.tasks = ("code", "text")
    config.eval.every_steps = 0
    if arg == "languages":
        config.data.sources = {
            name: {"share": share, "packing": "concat", "max_epochs": 0.0}
            for name, share in (("code/C++", 3.0), ("code/Java", 1.0), ("web", 1.0))
        }
"""


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    tokenizer = make_project(root, CHANGES, {"code": range(10, 40), "text": range(150, 180)})
    write_model(root / "base", preset("tiny", vocab_size=300), tokenizer.files())
    return root
