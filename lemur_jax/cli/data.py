"""What a run reads: `prepare`, `inspect`."""

import os
import shlex
import sys

from lemur_jax.cli.arguments import Verbs, add_config, add_verb, check_output_file, open_config
from lemur_jax.common.errors import UserError


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _prepare,
        "read a config's tasks once and write token stores",
        "lemur prepare --config configs/smollm2_lemur.py",
    )
    add_config(parser)
    text = "replace stores whose data, steps or tokenizer have changed; runs that read them cannot continue"
    parser.add_argument("--replace", action="store_true", help=text)
    text = "runner of Apache Beam, e.g. FnApiRunner (local); default: processes of this machine"
    parser.add_argument("--runner", default="", help=text)
    text = "options of Beam's pipeline, e.g. --runner-options='--region=X --project=Y'"
    parser.add_argument("--runner-options", type=shlex.split, default="", help=text)

    parser = add_verb(
        verbs,
        _inspect,
        "show what is in a token store, or what a config would train on",
        "lemur inspect quickstart/stores/python_chat/train --tokenizer quickstart/tokenizer_chat",
    )
    parser.set_defaults(takes_config=True)
    parser.add_argument("target", help="a token store, or a config file (path.py or path.py:arg)")
    parser.add_argument("--tokenizer", default="", help="directory of a store's tokenizer, to show its text")
    parser.add_argument("--samples", type=int, default=2, help="documents, or rows of each source, to show")
    parser.add_argument("--html", default="", metavar="FILE", help="write a page instead of printing")


def _prepare(args) -> None:
    config = open_config(args, cpu=True)
    from lemur_jax.prepare.prepare import prepare

    if args.runner_options and not args.runner:
        raise UserError("--runner-options are of a Beam runner: name it with --runner")
    prepare(config, replace=args.replace, runner=args.runner, runner_options=args.runner_options)


def _inspect(args) -> None:
    check_output_file("--html", args.html)
    if args.samples < 0:
        raise UserError(f"--samples is {args.samples}: it must be 0 or more")
    from lemur_jax.data.inspect import inspect_mixture, inspect_store
    from lemur_jax.text.tokenizer import Tokenizer

    terminal = bool(sys.stdout and sys.stdout.isatty()) and not os.environ.get("NO_COLOR")
    options = {"samples": args.samples, "color": bool(args.html) or terminal}
    is_config = args.target.partition(":")[0].endswith(".py")
    if is_config and args.tokenizer:
        raise UserError("--tokenizer is for a store, a config names its own: leave it out")
    if args.overrides and not is_config:
        raise UserError(f"{args.overrides[0]} is for a config: leave it out")
    if is_config:
        from lemur_jax.data.counts import check_counts
        from lemur_jax.data.mixture import open_mixture

        args.config = args.target
        config = open_config(args, cpu=True).with_counts()
        tokenizer = Tokenizer.from_config(config.tokenizer)
        mixture = open_mixture(config.data, tokenizer, seed=config.seed, batch_rows=config.train.batch_rows)
        check_counts(mixture, config.data, config.train.batch_documents)
        text = inspect_mixture(mixture, tokenizer, config.train.steps, **options)
    else:
        shown_with = Tokenizer.load(args.tokenizer) if args.tokenizer else None
        text = inspect_store(args.target, tokenizer=shown_with, **options)
    if args.html:
        from etils import epath

        epath.Path(args.html).write_text(_page(args.target, text))
        text = f"wrote {args.html}"
    print(text)


def _page(title: str, colored: str) -> str:
    """A self-contained HTML page of what `lemur inspect` prints in a terminal."""
    from lemur_jax.data.inspect import DIM, GREEN, PLAIN
    from lemur_jax.report.html import escape, html_page

    body = escape(colored).replace(PLAIN, "</span>")
    body = body.replace(GREEN, '<span class="supervised">').replace(DIM, '<span class="soft">')
    legend = "Green: tokens that the loss counts; grey: others. Rows of dashes divide documents."
    return html_page(title, f'<h1>{escape(title)}</h1><p class="soft">{legend}</p><pre>{body}</pre>')
