"""The command line `lemur`, one verb a job. A verb imports its package when it is called."""

import argparse
import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Collection, Sequence
from typing import Any

from lemur_jax import __version__
from lemur_jax.cli import data, evaluation, inference, planning, training, weights
from lemur_jax.cluster import coordination
from lemur_jax.cluster.exit import FAILED, INTERRUPTED, NO_READER, USER_ERROR, end_process
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.logging import setup
from lemur_jax.common.paths import is_refused_by_store
from lemur_jax.common.sections import did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns an exit status of `cluster/exit.py`."""
    setup()
    if arguments is None:  # a process of its own: handlers of libraries at the root logger would print again
        logging.getLogger("lemur_jax").propagate = False
    # gcsfs logs the traceback of every error that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, verbs = _parser()
    if not words:
        parser.print_help()
        return 0
    if not words[0].startswith("-") and words[0] not in verbs:
        meant = did_you_mean(words[0], verbs)
        print(f"lemur: there is no verb {words[0]!r}{meant}; see lemur --help", file=sys.stderr)
        return USER_ERROR
    args, rest = parser.parse_known_args(words)
    try:
        args.command = shlex.join(["lemur", *words])
        args.overrides = _overrides(rest, args.takes_config)
        for name in _PATHS & vars(args).keys():  # a shell leaves `~` alone in `--workdir=~/run`
            if path := getattr(args, name):
                setattr(args, name, os.path.expanduser(path))
        if not getattr(args, "workdir", "."):  # as of a shell variable that is not set
            raise UserError("--workdir is empty: name a directory")
        return args.run(args) or 0
    except BrokenPipeError:
        # The reader of standard output disconnected (`lemur inspect ... | head`); shells report a SIGPIPE like this.
        sys.stderr.close()
        status = NO_READER
    except Exception as error:
        line = _one_line(error)
        if line is None:
            if coordination.client() is None:
                raise
            traceback.print_exc()
            status = FAILED
        else:
            print(f"lemur {args.verb}: {' '.join(map(str.strip, line.splitlines()))}", file=sys.stderr)
            status = USER_ERROR
    except KeyboardInterrupt:
        text = "interrupted; the same command continues from what is finished"
        print(f"lemur {args.verb}: {text}", file=sys.stderr)
        status = INTERRUPTED
    if coordination.client() is not None:
        end_process(status)
    return status


# Options that are paths. A model may be ORG/NAME too.
_PATHS = {
    "checkpoint", "config", "data", "hf", "hlo", "html", "include_path", "json", "output", "reference", "replay",
    "tokenizer", "traces", "workdir", "write_reference",
}  # fmt: skip


def _one_line(error: Exception) -> str | None:
    """One line for an error that the user can correct; None for any other, which needs its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if is_refused_by_store(error):
        return (
            f"the object store cannot be reached, or refuses: {reason_of(error)}; look at the network"
            " and at the credentials, and run the same command again"
        )
    # As text: where a disk or a quota is full, TensorStore raises a ValueError.
    if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
        return f"{reason_of(error)}; free some space, or name another place, and run the same command again"
    # What the file system says of a path; a file of ours that is not there is a fault of ours.
    if isinstance(error, OSError) and error.filename and error.errno not in (None, errno.ENOENT):
        return f"{error.strerror}: {error.filename}"
    return None


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


class _Parser(argparse.ArgumentParser):
    """Shows the default of each option that has one in `--help`."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        default, text = options.get("default"), options.get("help") or ""
        is_unset = default is None or default is False or default in ("", [], argparse.SUPPRESS)
        if not is_unset and "default" not in text:
            options["help"] = f"{text} (default: %(default)s)"
        return super().add_argument(*names, **options)


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser and the names of its verbs."""
    parser = _Parser(
        prog="lemur",
        description="Pretrain, tune, convert and run language models in JAX, from one machine to a TPU pod.",
    )
    parser.add_argument("--version", action="version", version=f"lemur_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for group in (data, planning, training, weights, inference, evaluation):
        group.add_verbs(verbs)
    return parser, verbs.choices
