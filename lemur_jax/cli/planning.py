"""What a run would cost: `plan`."""

import os

from lemur_jax.cli.arguments import Verbs, add_config, add_verb


def add_verbs(verbs: Verbs) -> None:
    sub = add_verb(
        verbs,
        "plan",
        _plan,
        "compile a config's update for a TPU slice, without one: does it fit, how fast is it (an estimate)",
        "lemur plan --config configs/quickstart_lemur.py --topology v5e-1",
    )
    add_config(sub)
    sub.add_argument("--topology", required=True, help="e.g. v4-512, v5e-256, v5p-128, v6e-64, tpu7x-64")
    sub.add_argument("--slices", type=int, default=1, help="slices joined by the data-centre network")
    sub.add_argument(
        "--mode", choices=("train", "generate"), default="train", help="the update, or prefill and decode"
    )
    sub.add_argument("--json", default="", metavar="FILE", help="also write the plan as JSON")
    sub.add_argument(
        "--hlo", default="", metavar="FILE", help="also write the optimized HLO text of the update"
    )

    search = sub.add_argument_group(
        "--search", "find the best mesh, rematerialization, microbatches and options"
    )
    search.add_argument(
        "--search", action="store_true", help="compile the promising ones, instead of the config's own"
    )
    search.add_argument("--minutes", type=float, default=10.0, help="time for the search (default: 10)")
    search.add_argument(
        "--processes", type=int, default=2, help="compiles at a time, 2 to 3 GiB each (default: 2)"
    )
    search.add_argument(
        "--output", default="search", metavar="DIR", help="for best.py, pareto.html, search.json"
    )
    search.add_argument(
        "--cache", default="", metavar="DIR", help="finished plans (default: ~/.cache/lemur_jax/plans)"
    )

    generate = sub.add_argument_group("--mode generate")
    generate.add_argument("--batch", type=int, default=32, help="sequences at a time (default: 32)")
    generate.add_argument(
        "--prompt-length", type=int, default=1024, help="tokens of each prompt (default: 1024)"
    )
    generate.add_argument(
        "--cache-length", type=int, default=2048, help="prompt and answer together (default: 2048)"
    )
    generate.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights and cache"
    )


def _plan(args) -> int:
    """0 if the config fits, or with --search if anything does; else 1."""
    from lemur_jax.config import load

    config = load(args.config, args.overrides)
    _check_directories(args)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is only described
    if args.search:
        return _search(args, config)
    if args.mode == "generate":
        from lemur_jax.plan.generate import format_generate_plan, plan_generate

        generation = plan_generate(
            config, args.topology, slices=args.slices, batch=args.batch, prompt_length=args.prompt_length,
            cache_length=args.cache_length, dtype=args.dtype,
        )  # fmt: skip
        print(format_generate_plan(generation))
        return _write(args.json, generation)
    from lemur_jax.plan.plan import format_plan, plan

    made = plan(config, args.topology, slices=args.slices, hlo_path=args.hlo or None)
    print(format_plan(made))
    return _write(args.json, made)


def _check_directories(args) -> None:
    """Refuses before minutes of compiling what could not be written after them."""
    from lemur_jax.common.errors import UserError

    wanted = {"--json": os.path.dirname(args.json), "--hlo": os.path.dirname(args.hlo)}
    for option, directory in wanted.items():
        if "://" not in directory and not os.access(directory or ".", os.W_OK):
            raise UserError(
                f"{option} cannot be written: there is no directory {directory}, or it is read-only"
            )
    if args.search:
        try:
            os.makedirs(args.output, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {args.output} cannot be made: {error.strerror}") from error


def _write(path: str, made) -> int:
    """Writes the JSON of a plan if asked for; returns the exit code."""
    if path:
        from etils import epath

        epath.Path(path).write_text(made.to_json() + "\n")
    return 0 if made.fits else 1


def _search(args, config) -> int:
    import pathlib

    from lemur_jax.common.errors import UserError
    from lemur_jax.plan import pareto
    from lemur_jax.plan.search import search

    if args.mode != "train" or args.json or args.hlo:
        raise UserError(
            "--search plans training alone and writes into --output: leave out --mode, --json and --hlo"
        )
    if args.minutes <= 0 or args.processes < 1:
        raise UserError("--minutes must be above 0 and --processes at least 1")
    found = search(
        config,
        args.topology,
        slices=args.slices,
        minutes=args.minutes,
        processes=args.processes,
        cache=pathlib.Path(args.cache or "~/.cache/lemur_jax/plans").expanduser(),
    )
    print(f"\n{pareto.format_search(found)}")
    output = pathlib.Path(args.output)
    pareto.write(found, output, args.config, args.overrides, f"{args.config} on {args.topology}")
    if not found.best:
        return 1
    print(
        f"\nthe fastest: lemur train --config {output / 'best.py'} --workdir DIR    (plot: {output / 'pareto.html'})"
    )
    return 0
