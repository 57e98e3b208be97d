"""Runs: `train`, `rl`, `sweep`, `doctor`, `checkpoints`, `report`."""

import argparse
import os
import re

from lemur_jax.cli.arguments import (
    Verbs,
    add_config,
    add_devices,
    add_verb,
    check_output_file,
    check_texts,
    open_config,
    start_jax,
)
from lemur_jax.common.errors import UserError


def add_verbs(verbs: Verbs) -> None:
    for add in (_add_train, _add_rl, _add_sweep, _add_doctor, _add_checkpoints, _add_report):
        add(verbs)


def _add_run(parser: argparse.ArgumentParser, workdir: str, extend: str = "") -> None:
    """`--config`, `--workdir`, the devices, and `--extend` if it has a help text; `workdir`, `extend`: help texts."""
    add_config(parser)
    parser.add_argument("--workdir", required=True, help=workdir)
    add_devices(parser)
    if extend:
        parser.add_argument("--extend", action="store_true", help=extend)


def _add_train(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _train,
        "train or resume; pretraining and chat tuning alike",
        "lemur train --config configs/smollm2_lemur.py --workdir quickstart/smollm2/lemur",
    )
    text = "continue the run with more steps, another learning rate, or other stages of the mixture"
    _add_run(parser, "directory of the run, local or gs://", text)
    text = "trace steps into WORKDIR/profile, for TensorBoard and Perfetto: 10:13 for steps 10, 11 and 12"
    parser.add_argument("--profile", default="", metavar="FIRST:STOP", help=text)


def _add_rl(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _rl,
        "train a chat model by reinforcement in environments, or resume",
        "lemur rl --config configs/quickstart_rl.py --workdir quickstart/runs/rl",
    )
    text = "continue the run with more steps or another learning rate"
    _add_run(parser, "directory of the run, local or gs://", text)


def _add_sweep(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _sweep,
        "train one base on several mixtures, and show what each gives and costs",
        "lemur sweep --config configs/quickstart_lemur.py --workdir quickstart/sweep --ratios 1:0,10:1,1:1,0:1"
        " --config.train.steps=120",
    )
    _add_run(parser, "directory of the sweep; its runs lie below it")
    parser.add_argument("--ratios", default="", help="e.g. 1:0,10:1,1:1: shares of the tokens")
    text = "whose shares; python&java,text: a part may be several (default: the order of config.eval.tasks)"
    parser.add_argument("--sources", default="", metavar="NAME,NAME", help=text)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each mixture")
    text = "also another config key, e.g. optimizer.learning_rate=1e-3,3e-3; may be given several times"
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE,VALUE", help=text)
    text = "afterwards, merge with the base: linear:0.5 each run, arithmetic:0.5 the sum of one-source runs"
    parser.add_argument("--merge", default="", metavar="KIND:WEIGHT,...", help=text)
    parser.add_argument("--print", action="store_true", help="only print each run's `lemur train` command")


def _add_doctor(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _doctor,
        "check everything that a run needs, on every host, before it starts",
        "lemur doctor --config configs/smollm2_lemur.py --workdir quickstart/smollm2/lemur",
    )
    text = "before `train --extend`: accept what that may change"
    _add_run(parser, "directory of the run; left as it is", text)


def _add_checkpoints(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _checkpoints,
        "list the checkpoints of a run and verify every byte of them; exit status 1 if one is damaged",
        "lemur checkpoints quickstart/smollm2/lemur",
    )
    parser.add_argument("workdir", help="workdir or checkpoint directory")
    text = "instead: config keys in which two steps differ"
    parser.add_argument("--diff", type=int, nargs=2, metavar="STEP", help=text)


def _add_report(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _report,
        "draw runs as one HTML page: stages of a recipe, or runs to compare",
        "lemur report quickstart/smollm2/lemur quickstart/smollm2/chat",
    )
    parser.add_argument("workdirs", nargs="+", help="workdirs in the order of their stages")
    parser.add_argument("--output", default="report.html", help="file to write")
    parser.add_argument("--overlay", action="store_true", help="open the page with all runs on one axis")
    parser.add_argument("--table", action="store_true", help="also print the table of bits per byte")
    text = "show how each newest checkpoint continues this"
    parser.add_argument("--prompt", action="append", default=[], help=text)
    text = "show how each answers this, in its chat template"
    parser.add_argument("--question", action="append", default=[], help=text)


def _train(args) -> int:
    config = open_config(args).with_counts()
    from lemur_jax.telemetry.profiler import parse_steps

    return _run(args, config, profile=parse_steps(args.profile) if args.profile else range(0))


def _rl(args) -> int:
    config = open_config(args)
    from lemur_jax.rl.run import open_inputs

    return _run(args, config, open_inputs=open_inputs)


def _run(args, config, **options) -> int:
    """Joins the hosts and trains."""
    start_jax(args, config.hosts.connect_seconds, config.hosts.lost_seconds)
    from lemur_jax.cluster.hosts import agree
    from lemur_jax.cluster.watchdog import host_watchdog
    from lemur_jax.train.loop import train

    with host_watchdog(config.hosts.lost_seconds):
        agree("the config", config.fingerprint)
        stopped = train(config, args.workdir, extend=args.extend, **options)
    return _status(stopped)


def _status(stopped: bool) -> int:
    """The exit status; a run that saved and stopped for a preemption has not failed: launchers start it again."""
    from lemur_jax.cluster.exit import TRY_AGAIN

    return TRY_AGAIN if stopped and os.environ.get("LEMUR_RELAUNCH") == "1" else 0


def _parse_vary(text: str) -> tuple[str, list[str]]:
    """The key and the values of "key=value,value"; a comma in parentheses is part of a value."""
    key, _, rest = text.partition("=")
    values = [value.strip() for value in re.split(r",(?![^(]*\))", rest)]
    if not key or not all(values):
        raise UserError(
            f"cannot read --vary {text!r}: write a config key and values, e.g. train.steps=100,200"
        )
    return key, values


def _sweep(args) -> int:
    varied = list(map(_parse_vary, args.vary))
    for key, _ in varied:
        if any(word.startswith(f"--config.{key}=") for word in args.overrides):
            raise UserError(f"--config.{key} has no effect beside --vary {key}: leave one of them out")
    # With the first of the varied values: the config's own need not be valid.
    config = open_config(args, [f"--config.{key}={values[0]}" for key, values in varied])
    ratios, merges = (
        [word.strip() for word in text.split(",") if word.strip()] for text in (args.ratios, args.merge)
    )
    from lemur_jax.sweep.merging import plan_merges
    from lemur_jax.sweep.runs import command, plan_runs, run_configs

    runs = plan_runs(config, ratios, args.seeds, varied, args.sources)
    merged = plan_merges(merges, runs)
    configs = run_configs(args.config, args.overrides, runs)
    if args.print:
        for run in runs:
            print(command(args.config, args.overrides, run, args.workdir))
        return 0
    start_jax(args, config.hosts.connect_seconds, config.hosts.lost_seconds)
    from lemur_jax.sweep.results import markdown_table
    from lemur_jax.sweep.runner import sweep

    results = sweep(configs, merged, args.workdir, args.command)
    if results:
        plot = "pareto.svg, " if len(results.groups) > 1 else ""
        print(f"{markdown_table(results)}\nwrote {args.workdir}/index.html, table.md, {plot}results.json")
    return _status(stopped=not results)


def _doctor(args) -> None:
    config = open_config(args).with_counts()
    start_jax(args, config.hosts.connect_seconds, config.hosts.lost_seconds)
    from lemur_jax.cluster.watchdog import host_watchdog
    from lemur_jax.train.doctor import doctor

    with host_watchdog(config.hosts.lost_seconds):
        doctor(config, args.workdir, extend=args.extend)


def _checkpoints(args) -> int:
    start_jax(args)
    from lemur_jax.checkpoint.listing import checkpoint_table, config_difference

    text, intact = (
        (config_difference(args.workdir, *args.diff), True) if args.diff else checkpoint_table(args.workdir)
    )
    print(text)
    return 0 if intact else 1


def _report(args) -> None:
    from lemur_jax.report import bits_per_byte_table, write_report

    check_output_file("--output", args.output)
    check_texts("--prompt", args.prompt)
    check_texts("--question", args.question)
    answers, prompts = {}, [*args.prompt, *(f"{question}\n\n" for question in args.question)]
    if prompts:
        start_jax(args)
        from lemur_jax.report.samples import sample

        answers = sample(args.workdirs, args.prompt, args.question)
    path = write_report(args.workdirs, args.output, prompts=prompts, answers=answers, overlay=args.overlay)
    if args.table:
        print(bits_per_byte_table(args.workdirs))
    print(f"wrote {path}")
