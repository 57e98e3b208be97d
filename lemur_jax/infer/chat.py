"""Conversation with a chat model: history, template, streamed answers."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.infer.complete import pieces
from lemur_jax.infer.engine import GREEDY
from lemur_jax.infer.generate import make_engine, make_requests
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session
from lemur_jax.text.chat_template import Message, encode_chat, stop_ids
from lemur_jax.text.tokenizer import Tokenizer

STEPS = 8  # tokens of an answer between two outputs
HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C cuts an answer short"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a turn is answered."""

    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its variables

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The prompt for the assistant's next turn; UserError as `encode_chat`."""
        kwargs = self.chat_template_kwargs
        return encode_chat(tokenizer, messages, chat_template_kwargs=kwargs, add_generation_prompt=True)[0]


def reply(
    session: Session, messages: Sequence[Message], options: Options = Options(), *, seed: int = 0
) -> Iterator[str]:
    """The assistant's next turn, streamed as text without the token that ends it.

    Args:
      messages: the conversation so far, the user's turn last.
      seed: this turn's own; see `Sampling.seed`.

    Raises:
      UserError: there is no tokenizer or it is not a chat model's, its template does not use one of the
        variables, or the conversation and `max_new_tokens` are longer than the model's `max_position_embeddings`.
    """
    tokenizer = session.need_tokenizer()
    limit, prompt = options.max_new_tokens, options.encode(tokenizer, messages)
    (request,) = make_requests([prompt], limit, stop_ids(tokenizer), options.sampling, [seed])
    engine = make_engine(session, [request])
    for piece in pieces(session, engine, request):
        if piece is None:
            engine.step(STEPS)
        elif text := piece[0]:
            yield text


def fit(session: Session, messages: Sequence[Message], options: Options) -> list[Message]:
    """The system turn, and the newest turns that leave space for an answer, from a user's turn on.

    The last turn is kept even if it alone is too long.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(head) :])
    limit = session.model.max_position_embeddings - options.max_new_tokens

    def length() -> int:
        return len(options.encode(session.need_tokenizer(), [*head, *turns]))

    while len(turns) > 1 and (turns[0]["role"] != "user" or length() > limit):
        del turns[0]
    return head + turns


def converse(
    session: Session,
    lines: Iterable[str],
    write: Callable[[str], None],
    options: Options = Options(),
    *,
    system: str = "",
    continue_on_error: bool = False,
) -> list[Message]:
    """A whole conversation: each line is a user's turn, answers are written as they come.

    Args:
      lines: the user's turns, or commands (`HELP`); blank ones are skipped.
      write: takes text, e.g. `print(text, end="", flush=True)`.
      system: text of a system turn in front; "": none.
      continue_on_error: write what is wrong with a turn, e.g. that it is too long, and take the next line.

    Returns:
      The final messages.

    Raises:
      UserError: as `reply`, without `continue_on_error`.
    """
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for turn, line in enumerate(map(str.strip, lines)):
        if line == "/exit":
            break
        if line == "/help":
            write(HELP + "\n")
        elif line == "/reset":
            messages = list(start)
            write("(forgotten)\n")
        elif line:
            history = [*messages, {"role": "user", "content": line}]
            try:
                turns = fit(session, history, options)
                if dropped := len(history) - len(turns):
                    write(f"(the first {dropped} turns no longer fit the model's context and are left out)\n")
                answer = _write_answer(reply(session, turns, options, seed=turn), write)
            except UserError as error:
                if not continue_on_error:
                    raise
                write(f"({error})\n")
            else:
                messages = [*turns, {"role": "assistant", "content": answer}]
    return messages


def _write_answer(pieces: Iterator[str], write: Callable[[str], None]) -> str:
    """Writes the pieces and returns them joined; Ctrl-C ends the answer and keeps its beginning."""
    answer = ""
    try:
        for piece in pieces:
            piece = piece if answer else piece.lstrip()
            write(piece)
            answer += piece
    except KeyboardInterrupt:
        write(" (cut short)")
    write("\n")
    return answer.strip()
