"""What a run would cost: `plan`."""

import dataclasses
import json
from typing import Any

from lemur_jax.cli.arguments import Verbs, add_config, add_verb, check_output_file, open_config
from lemur_jax.common.errors import UserError

# Options that not every mode reads.
_SEARCH_DEFAULTS = {"minutes": 10.0, "processes": 2, "output": "search", "cache": "~/.cache/lemur_jax/plans"}
_GENERATE_DEFAULTS = {"batch": 32, "prompt_length": 1024, "cache_length": 2048, "dtype": "bfloat16"}


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _plan,
        "compile a config's update for a TPU slice, without one: does it fit, how fast is it (an estimate)",
        "lemur plan --config configs/quickstart_lemur.py --topology v5e-1",
    )
    add_config(parser)
    parser.add_argument("--topology", required=True, help="e.g. v4-512, v5e-16x16, v6e-64, tpu7x-4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="slices joined by the data-centre network")
    modes = ("train", "generate", "rl")
    text = "the update, prefill and decode, or both of lemur rl"
    parser.add_argument("--mode", choices=modes, default="train", help=text)
    parser.add_argument("--json", default="", metavar="FILE", help="also write the plan as JSON")
    text = "also write the update's optimized HLO text, if it fits"
    parser.add_argument("--hlo", default="", metavar="FILE", help=text)

    search = parser.add_argument_group("--search")
    search.add_argument("--search", action="store_true", help="find the best mesh, remat and options")
    search.add_argument("--minutes", type=float, help="time for the search (default: %(default)s)")
    text = "compilations at a time, 2 to 3 GiB each (default: %(default)s)"
    search.add_argument("--processes", type=int, help=text)
    text = "for best.py, pareto.html and search.json (default: %(default)s)"
    search.add_argument("--output", metavar="DIR", help=text)
    search.add_argument("--cache", metavar="DIR", help="finished plans (default: %(default)s)")

    generate = parser.add_argument_group("--mode generate, and --prompt-length of --mode rl")
    generate.add_argument("--batch", type=int, help="sequences at a time (default: %(default)s)")
    generate.add_argument("--prompt-length", type=int, help="tokens of each prompt (default: %(default)s)")
    generate.add_argument("--cache-length", type=int, help="prompt and answer (default: %(default)s)")
    text = "of weights and cache (default: %(default)s)"
    generate.add_argument("--dtype", choices=("bfloat16", "float32"), help=text)
    parser.set_defaults(**_SEARCH_DEFAULTS, **_GENERATE_DEFAULTS)


def _plan(args) -> int:
    """0 if the config fits, or with --search if anything does; else 1."""
    config = open_config(args, cpu=True)  # the slice is only described
    check_output_file("--json", args.json)
    check_output_file("--hlo", args.hlo)
    if args.hlo and args.mode != "train":
        raise UserError("--hlo is for --mode train: leave it out")
    _check_modes(args)
    from lemur_jax.plan.topologies import find_slice

    tpu = find_slice(args.topology, args.slices)
    if args.search:  # it chooses the mesh, to which rows from the counts would be rounded
        return _search(args, config)
    if "://" not in config.data.stores:  # a plan needs no network
        config = config.with_counts()
    result: Any
    if args.mode == "generate":
        from lemur_jax.plan.generate import format_generate_plan, plan_generate

        sizes = {name: getattr(args, name) for name in _GENERATE_DEFAULTS}
        result = plan_generate(config.model, config.mesh, tpu, **sizes)
        print(format_generate_plan(result))
    elif args.mode == "rl":
        from lemur_jax.rl.plan import format_rl_plan, plan_rl

        result = plan_rl(config, args.topology, slices=args.slices, prompt_length=args.prompt_length)
        print(format_rl_plan(result))
    else:
        from lemur_jax.plan.plan import format_plan, plan

        result = plan(config, args.topology, slices=args.slices, hlo_path=args.hlo or None)
        print(format_plan(result))
        if not result.fits:
            print("\nadd --search to look for a layout that fits")
    if args.json:
        from etils import epath

        epath.Path(args.json).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return 0 if result.fits else 1


def _check_modes(args) -> None:
    """Refuses options of another mode, which would have no effect."""
    options_by_mode = {"search": _SEARCH_DEFAULTS, "generate": _GENERATE_DEFAULTS, "rl": ("prompt_length",)}
    allowed = options_by_mode.get("search" if args.search else args.mode, ())
    for name, default in (_SEARCH_DEFAULTS | _GENERATE_DEFAULTS).items():
        if name not in allowed and getattr(args, name) != default:
            reader = "--search" if name in _SEARCH_DEFAULTS else "--mode generate"
            raise UserError(f"--{name.replace('_', '-')} is for {reader}: leave it out, or add {reader}")


def _search(args, config) -> int:
    import pathlib

    from lemur_jax.plan import pareto
    from lemur_jax.plan.search import search

    if args.mode != "train" or args.json or args.hlo:
        raise UserError("--search plans training into --output: leave out --mode, --json and --hlo")
    if not args.minutes > 0 or args.processes < 1:
        raise UserError("--minutes must be above 0 and --processes at least 1")
    if "://" in args.output + args.cache:
        raise UserError("--output and --cache must be directories of this machine")
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    options = {"slices": args.slices, "minutes": args.minutes, "processes": args.processes}
    result = search(config, args.topology, **options, cache=pathlib.Path(args.cache).expanduser())
    print(f"\n{pareto.format_search(result)}")
    pareto.write(result, output, args.config, args.overrides, f"{args.config} on {args.topology}")
    if not result.best:
        return 1
    print(
        f"\nthe fastest: lemur train --config {output / 'best.py'} --workdir DIR    (plot: {output / 'pareto.html'})"
    )
    return 0
