"""The console command `lemur`: one verb a job. A verb's room is imported only when it is called."""

import argparse
import errno
import logging
import shlex
import sys
import traceback
from collections.abc import Sequence

from lemur_jax.cli import data, evaluation, inference, planning, training, weights
from lemur_jax.cluster import coordination
from lemur_jax.cluster.exit import FAILED, INTERRUPTED, NO_READER, TRY_AGAIN, USER_ERROR, leave
from lemur_jax.common.errors import TemporaryError, UserError, reason_of
from lemur_jax.common.logging import setup
from lemur_jax.common.paths import is_refused_by_store


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
      An exit status of `cluster/exit.py`.
    """
    setup()
    logging.getLogger("gcsfs").addFilter(_is_news)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    try:
        known.command = shlex.join(["lemur", *(sys.argv[1:] if arguments is None else arguments)])
        known.overrides = _overrides(rest, known.takes_config)
        return known.run(known) or 0
    except BrokenPipeError:
        # Whoever read our output has gone (`lemur inspect ... | head`): not all was done, as shells say of a SIGPIPE.
        sys.stderr.close()
        return leave(NO_READER)
    except Exception as error:
        line = _one_line(error)
        if line is None:
            if coordination.client() is None:
                raise
            traceback.print_exc()
            return leave(FAILED)
        print(f"lemur {known.verb}: {line}", file=sys.stderr)
        return leave(TRY_AGAIN if isinstance(error, TemporaryError) else USER_ERROR)
    except KeyboardInterrupt:
        print(
            f"lemur {known.verb}: interrupted; the same command goes on from what is finished",
            file=sys.stderr,
        )
        return leave(INTERRUPTED)


# What the file system says of a disk, and of a path.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_WRONG_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


def _one_line(error: Exception) -> str | None:
    """What to say of an error that the user can mend; None of any other, which needs its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if is_refused_by_store(error):
        return (
            f"the object store cannot be reached, or refuses: {reason_of(error)}; look at the network"
            " and at the credentials, and run the same command again"
        )
    if (
        isinstance(error, OSError)
        and error.filename is not None
        and error.errno in _FULL + _TOO_MANY + _WRONG_PLACE
    ):
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.strerror}"
    return None


def _is_news(record: logging.LogRecord) -> bool:
    """gcsfs logs the whole traceback of what it raises, too."""
    return not record.exc_info


def _overrides(rest: Sequence[str], allowed: bool) -> list[str]:
    """`--config.a.b=value` and `--config.a.b value`, as the former."""
    overrides: list[str] = []
    words = iter(rest)
    for word in words:
        if not allowed or not word.startswith("--config."):
            raise UserError(f"unknown argument {word}; see lemur --help")
        if "=" not in word:
            value = next(words, None)
            if value is None:
                raise UserError(f"{word} needs a value: {word}=VALUE")
            word = f"{word}={value}"
        overrides.append(word)
    return overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lemur",
        description="Pretrain, tune, convert and run Llama models in JAX, from one machine to a TPU pod.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for group in (data, planning, training, weights, inference, evaluation):
        group.add_verbs(verbs)
    return parser
