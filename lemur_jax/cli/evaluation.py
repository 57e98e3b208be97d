"""How good a checkpoint is: `eval`."""

import contextlib
import dataclasses

from lemur_jax.cli.arguments import Verbs, add_checkpoint, add_verb, open_session
from lemur_jax.common.errors import UserError


def add_verbs(verbs: Verbs) -> None:
    sub = add_verb(
        verbs,
        "eval",
        _eval,
        "run benchmarks: HumanEval and MBPP in a sandbox, all others through lm-evaluation-harness",
        "lemur eval --checkpoint quickstart/runs/lemur --tasks humaneval --limit 8",
    )
    add_checkpoint(sub, required=False)
    sub.add_argument("--tasks", default="", help="names with commas: humaneval, mbpp, or the harness's")
    sub.add_argument("--suite", default="", help="paper: MMLU, BBH, GSM8K, HumanEval and MBPP")
    sub.add_argument("--data", default=".", help="directory with mbpp.jsonl, mmlu/, bbh/, gsm8k/")
    sub.add_argument(
        "--scores",
        default="",
        metavar="NAME=PERCENT,...",
        help="of Spider, MultiPL-E, DS-1000, for the suite's table",
    )
    sub.add_argument("--include-path", default="", help="directory of task files (YAML) for the harness")
    sub.add_argument("--limit", type=int, help="number of documents of each task")
    sub.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--max-new-tokens",
        type=int,
        help="of an answer or an agent's turn (default: what a task says, else 512)",
    )
    sub.add_argument("--agents", default="", help="episodes with environments: python, sql, bash, tools")
    sub.add_argument("--turns", type=int, default=5, help="turns of an episode at most (default 5)")
    sub.add_argument("--endpoint", default="", help="OpenAI-compatible URL of the agent, not the checkpoint")
    sub.add_argument("--endpoint-model", default="", help="the agent's name there")
    sub.add_argument("--json", default="", metavar="FILE", help="also write everything as JSON")
    sub.add_argument("--html", default="", metavar="FILE", help="also write the episodes as a page")


def _eval(args) -> None:
    import json

    from lemur_jax.evals.published import parse_scores

    written: dict = {}
    scores = parse_scores(args.scores)  # before a checkpoint is opened
    tasks = [task for task in args.tasks.split(",") if task]
    needs_session = tasks or args.suite or not args.endpoint
    if needs_session and not args.checkpoint:
        raise UserError("name a --checkpoint; agents alone can have an --endpoint instead")

    def check(tokenizer) -> None:
        from lemur_jax.evals.benchmarks import check_tasks

        check_tasks(tasks, _options(args))

    with open_session(args, check) if needs_session else contextlib.nullcontext() as session:
        try:
            if tasks or args.suite or not args.agents:
                _benchmarks(args, session, tasks, scores, written)
            if args.agents:
                _agents(args, session, written)
        finally:
            # An endpoint that fails, or Ctrl-C, does not lose finished work.
            if args.json and written:
                with open(args.json, "w") as file:
                    json.dump(written, file, indent=1)


def _benchmarks(args, session, tasks: list[str], scores: dict[str, float], written: dict) -> None:
    from lemur_jax.evals.benchmarks import evaluate, format_results, to_json

    results = evaluate(session, tasks, _options(args), suite=args.suite, scores=scores)
    print(format_results(results, args.checkpoint))
    written |= to_json(results, args.checkpoint)


def _options(args):
    from lemur_jax.evals.benchmarks import Options

    return Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})


def _agents(args, session, written: dict) -> None:
    from lemur_jax.agents import episodes
    from lemur_jax.agents.page import agents_page

    limit = args.max_new_tokens or 512
    agent = (
        episodes.endpoint_agent(args.endpoint, args.endpoint_model, max_new_tokens=limit)
        if args.endpoint
        else episodes.session_agent(session, max_new_tokens=limit)
    )
    traces: list[episodes.Trace] = []
    try:
        for world in episodes.open_environments(args.agents.split(","), args.limit):
            traces.append(episodes.run_episode(world, agent, max_turns=args.turns))
    finally:
        if traces:
            print(episodes.format_episodes(traces, args.turns))
            written["agents"] = episodes.to_json(traces, args.turns)
            if args.html:
                with open(args.html, "w") as file:
                    file.write(agents_page(traces, args.turns, args.checkpoint or args.endpoint_model))
