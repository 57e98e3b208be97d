"""The config of a run that starts from a model: its shape, tokenizer and weights, with no preset to transcribe."""

import os

from etils import epath
from ml_collections import ConfigDict

from lemur_jax.cluster import hosts
from lemur_jax.common.errors import UserError
from lemur_jax.common.hub import local_model
from lemur_jax.config import default_config
from lemur_jax.convert.hf_weights import holds_weights
from lemur_jax.convert.source import open_source


def config_from_checkpoint(path: epath.PathLike) -> ConfigDict:
    """A config to change, with what `path` defines: `model`, `tokenizer` and `init.checkpoint`.

    `path` is a Hugging Face directory, a run's workdir or a checkpoint, local or gs://, or ORG/NAME[@REVISION]. To read
    one of our checkpoints the hosts of a run join here, within the default times of `config.hosts`. Raises
    UserError if there is no model, or its tokenizer is no longer where its run found it.
    """
    path = os.path.expanduser(path)
    ours = not holds_weights(local_model(path))
    if ours:
        hosts.join()  # reading a checkpoint makes JAX's devices
    source = open_source(path)
    config = default_config(source.model.to_dict())
    config.init.checkpoint = tokenizer = os.fspath(path)
    if ours:
        options = source.run_config["tokenizer"] if source.run_config else {}
        tokenizer = options.get("path", "")
        if not tokenizer or not epath.Path(local_model(tokenizer)).exists():
            raise UserError(
                f"{path} was trained with the tokenizer in {tokenizer or 'an unknown directory'}, which is not there:"
                " export it with `lemur export-hf` and start from that directory"
            )
        config.tokenizer.chat_template = options.get("chat_template", "")
    config.tokenizer.path = tokenizer
    # A row holds at most the positions that the model was made for; 2048 is the default length of a row.
    config.data.sequence_length = min(config.data.sequence_length, source.model.max_position_embeddings)
    return config
