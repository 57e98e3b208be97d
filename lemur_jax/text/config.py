"""`config.tokenizer`: which tokenizer a run uses, and how `lemur prepare` makes it."""

import dataclasses

from lemur_jax.common.errors import UserError
from lemur_jax.common.sections import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer's directory; `prepare` trains or extends one there if it is empty."""

    path: str = ""  # directory with tokenizer.model or tokenizer.json
    train_vocab_size: int = 0  # above 0: `prepare` trains a SentencePiece BPE of this size if `path` is empty
    train_tasks: tuple[str, ...] = ()  # tasks on whose train splits it is trained
    extend: str = ""  # tokenizer directory that `prepare` extends and writes to `path`
    add_tokens: tuple[str, ...] = ()  # control tokens that `extend` adds, at the next ids
    chat_template: str = ""  # Jinja file; "": the template in `path`, or else ChatML

    def __post_init__(self):
        require(self.train_vocab_size >= 0, "tokenizer.train_vocab_size", self.train_vocab_size, "0 or more")
        if self.train_vocab_size and self.extend:
            raise UserError(
                "config.tokenizer.train_vocab_size and config.tokenizer.extend exclude each other: unset one"
            )
