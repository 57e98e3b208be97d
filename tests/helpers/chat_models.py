"""A small random chat model as a checkpoint and as a Hugging Face directory, made once a test session."""

import pathlib
import pydoc

import jax
import pytest

from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.models import decoder
from lemur_jax.models.presets import preset
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.tokenizer_files import extend, train_sentencepiece


def write_chat_model(path, tokenizer, **model):
    """Writes a checkpoint whose logits are spread out, so that greedy choices do not depend on rounding."""
    config = preset("tiny", vocab_size=tokenizer.vocab_size, **model)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    params["head"]["kernel"] *= 10
    metadata = make_metadata(model=config.to_dict(), tokenizer_files=tokenizer.files())
    write_params(path, params, metadata)
    return path


@pytest.fixture(scope="session")
def small_chat_tokenizer(tmp_path_factory):
    """500 SentencePiece pieces and ChatML's control tokens."""
    path = tmp_path_factory.mktemp("tokenizer")
    text = pathlib.Path(pydoc.__file__).read_text(encoding="utf-8")
    train_sentencepiece([text[:100_000]], path / "base", 500)
    return extend(path / "base", path / "chat", CHATML_TOKENS)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, small_chat_tokenizer):
    """A checkpoint with 128 positions."""
    path = tmp_path_factory.mktemp("chat_model") / "checkpoint"
    return write_chat_model(path, small_chat_tokenizer, max_position_embeddings=128)


@pytest.fixture(scope="session")
def chat_model_export(chat_model):
    """The same as a Hugging Face directory in float32."""
    path = chat_model.parent / "hf"
    export_hf(chat_model, path, dtype="float32")
    return path
