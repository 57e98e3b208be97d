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
    sub.add_argument("--json", default="", metavar="FILE", help="also write the plan as JSON")
    sub.add_argument(
        "--hlo", default="", metavar="FILE", help="also write the optimized HLO text of the update"
    )


def _plan(args) -> None:
    from lemur_jax.common.config import load

    config = load(args.config, args.overrides)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is only described
    from lemur_jax.plan.plan import plan, report

    found = plan(config, args.topology, slices=args.slices, hlo_path=args.hlo or None)
    print(report(found))
    if args.json:
        with open(args.json, "w") as file:
            file.write(found.to_json() + "\n")
