"""What the verbs share: their shape, groups of arguments, and how JAX and a checkpoint are opened."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from typing import Any

from lemur_jax.common.errors import UserError

LOST_SECONDS = 100.0  # as `config.hosts.lost_seconds`, which a checkpoint need not have

Verbs = Any  # what `ArgumentParser.add_subparsers` returns; its class has no public name


def add_verb(verbs: Verbs, run, summary: str, example: str) -> argparse.ArgumentParser:
    """Adds the verb that `run(args)` implements, which may return an exit status; `_export_hf` is `export-hf`."""
    parser = verbs.add_parser(
        run.__name__.strip("_").replace("_", "-"),
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, takes_config=False)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config FILE`, and `--config.a.b=value` in `args.overrides`."""
    text = "config file, optionally with an argument: path.py or path.py:arg"
    parser.add_argument("--config", required=True, help=text)
    parser.set_defaults(takes_config=True)


def add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--virtual-devices", type=int, default=0, metavar="N", help="run on N virtual CPU devices"
    )


def add_checkpoint(parser: argparse.ArgumentParser, required: bool = True) -> None:
    text = "checkpoint directory, workdir, Hugging Face directory or ORG/NAME[@REVISION]"
    parser.add_argument("--checkpoint", required=required, default="", help=text)
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--mesh", default="", help="e.g. fsdp=4,tensor=2; default: all devices fsdp")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation"
    )
    parser.add_argument("--weights", default="float", choices=("float", "int8"), help="int8: 8-bit matrices")
    add_devices(parser)


def check_output_file(option: str, path: str) -> None:
    """UserError, before the work starts: `path` is a directory, or a file that cannot be written."""
    if os.path.isdir(path):
        raise UserError(f"{option} {path} is a directory: name a file")
    if not path or "://" in path:
        return
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory):
        raise UserError(
            f"{option} {path} cannot be written: there is no directory {directory}; make it first"
        )
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise UserError(
            f"{option} {path} cannot be written: it or its directory is read-only; name another place"
        )


def check_texts(option: str, texts: Sequence[str]) -> None:
    """Raises UserError for a word of the command line that is not UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            escaped = text.encode(errors="backslashreplace").decode()
            raise UserError(
                f"{option} {escaped[:80]!r} is not UTF-8 from character {error.start} on: convert it, e.g. with iconv"
            ) from error


def open_config(args: argparse.Namespace, more: Sequence[str] = (), *, cpu: bool = False):
    """The config of `--config` and its overrides; a config file may import JAX, so the platform is settled before.

    Args:
      more: further overrides.
      cpu: use neither accelerators nor other hosts, even if there are some.
    """
    from lemur_jax.cluster import hosts
    from lemur_jax.config import load

    if cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    hosts.choose_platform(getattr(args, "virtual_devices", 0))
    with hosts.alone() if cpu else contextlib.nullcontext():
        return load(args.config, [*args.overrides, *more])


def start_jax(args: argparse.Namespace, *seconds: int) -> None:
    """Settles platform, devices and hosts (`hosts.join(*seconds)`) before anything uses JAX."""
    from lemur_jax.cluster import hosts

    hosts.choose_platform(getattr(args, "virtual_devices", 0))
    hosts.join(*seconds)


def require_single_host(otherwise: str) -> None:
    """Refuses several hosts, with the reason `otherwise`."""
    import jax

    if jax.process_count() > 1:
        raise UserError(otherwise)


@contextlib.contextmanager
def open_session(args: argparse.Namespace, check=lambda tokenizer: None):
    """The checkpoint on the mesh of the arguments; a host that fails or is lost inside the context ends the others.

    Args:
      check: as in `infer.session.load`.
    """
    start_jax(args)
    from lemur_jax.cluster import hosts
    from lemur_jax.cluster.watchdog import host_watchdog
    from lemur_jax.infer.session import load
    from lemur_jax.parallel.mesh import parse_mesh

    with host_watchdog(LOST_SECONDS):
        mesh = parse_mesh(args.mesh)
        hosts.keep_programs()
        yield load(args.checkpoint, mesh, args.dtype, args.step, weights=args.weights, check=check)
