"""A small random chat model as a checkpoint and as a Hugging Face directory."""

import pytest

from lemur_jax.checkpoint.manager import make_metadata, write_params
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.models.presets import preset
from tests.infer.conftest import chat_tokenizer, fresh_params  # noqa: F401


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, chat_tokenizer):  # noqa: F811
    """Logits spread out, so that greedy choices are no matter of rounding."""
    path = tmp_path_factory.mktemp("evals") / "checkpoint"
    config = preset("tiny", vocab_size=chat_tokenizer.vocab_size, max_position_embeddings=128)
    params = fresh_params(config)
    params["head"]["kernel"] *= 10
    metadata = make_metadata(model=config.to_dict(), tokenizer_files=chat_tokenizer.files())
    write_params(path, params, metadata)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint):
    path = checkpoint.parent / "hf"
    export_hf(checkpoint, path, dtype="float32")
    return path
