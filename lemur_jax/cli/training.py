"""Runs: `train`, `doctor`, `checkpoints`, `report`."""

import os

from lemur_jax.cli.arguments import Verbs, add_config, add_devices, add_verb, start_jax


def add_verbs(verbs: Verbs) -> None:
    sub = add_verb(
        verbs,
        "train",
        _train,
        "train or resume; pretraining and chat tuning alike",
        "lemur train --config configs/quickstart_base.py --workdir quickstart/runs/base",
    )
    add_config(sub)
    sub.add_argument("--workdir", required=True, help="directory of the run, local or gs://")
    add_devices(sub)

    sub = add_verb(
        verbs,
        "doctor",
        _doctor,
        "look at everything that a run needs, on every host, before the run",
        "lemur doctor --config configs/quickstart_base.py --workdir quickstart/runs/base",
    )
    add_config(sub)
    sub.add_argument("--workdir", required=True, help="directory of the run; left as it is")
    add_devices(sub)

    sub = add_verb(
        verbs,
        "checkpoints",
        _checkpoints,
        "list the checkpoints of a run and verify every byte of them",
        "lemur checkpoints quickstart/runs/base",
    )
    sub.add_argument("workdir", help="workdir or checkpoint directory")
    sub.add_argument(
        "--diff", type=int, nargs=2, metavar="STEP", help="instead: config keys in which two steps differ"
    )

    sub = add_verb(
        verbs,
        "report",
        _report,
        "draw runs as one HTML page",
        "lemur report quickstart/runs/base quickstart/runs/lemur quickstart/runs/chat",
    )
    sub.add_argument("workdirs", nargs="+", help="workdirs in the order of their stages")
    sub.add_argument("--output", default="report.html", help="file to write (default report.html)")
    sub.add_argument("--table", action="store_true", help="also print the table of bits per byte")
    sub.add_argument(
        "--prompt", action="append", default=[], help="show how each newest checkpoint continues this"
    )


def _train(args) -> int:
    from lemur_jax.common.config import fingerprint, load

    config = load(args.config, args.overrides)
    start_jax(args, config.hosts.connect_seconds, config.hosts.lost_seconds)
    from lemur_jax.parallel import liveness
    from lemur_jax.train.loop import train
    from lemur_jax.train.workdir import finished

    with liveness.watched(config.hosts.lost_seconds):
        liveness.agree("the config", fingerprint(config), config.hosts.connect_seconds)
        train(config, args.workdir)
    # A run that saved and stopped because its machine goes away has not failed, but it is not finished either.
    # Launchers tell the two apart by the exit status.
    if os.environ.get("LEMUR_RELAUNCH") == "1" and not finished(config, args.workdir):
        return liveness.LOST
    return 0


def _doctor(args) -> None:
    from lemur_jax.common.config import load

    config = load(args.config, args.overrides)
    start_jax(args, config.hosts.connect_seconds, config.hosts.lost_seconds)
    from lemur_jax.parallel import liveness
    from lemur_jax.train.doctor import doctor

    with liveness.watched(config.hosts.lost_seconds):
        doctor(config, args.workdir)


def _checkpoints(args) -> None:
    start_jax(args)
    from lemur_jax.checkpoint.listing import difference, table

    print(difference(args.workdir, *args.diff) if args.diff else table(args.workdir))


def _report(args) -> None:
    from lemur_jax.report.page import bits_per_byte_table, report

    answers = []
    if args.prompt:
        start_jax(args)
        from lemur_jax.report.samples import sample

        answers = sample(args.workdirs, args.prompt)
    path = report(args.workdirs, args.output, args.prompt, answers)
    if args.table:
        print(bits_per_byte_table(args.workdirs))
    print(f"wrote {path}")
