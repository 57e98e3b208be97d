"""How good a checkpoint is: `eval`."""

import argparse
import contextlib
import dataclasses
import pathlib
import signal
import sys

from lemur_jax.cli.arguments import Verbs, add_checkpoint, add_verb, check_output_file, open_session
from lemur_jax.cluster import coordination
from lemur_jax.common.errors import UserError

ENDPOINT_BATCH = 32  # episodes at a time of an endpoint, if --batch is not given


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _eval,
        "run benchmarks: HumanEval and MBPP in a sandbox, all others through lm-evaluation-harness",
        "lemur eval --checkpoint quickstart/smollm2/lemur --tasks humaneval --limit 8",
    )
    add_checkpoint(parser, required=False)
    parser.add_argument("--tasks", default="", help="comma-separated: humaneval, mbpp, or the harness's")
    parser.add_argument("--suite", default="", choices=("paper",), help="MMLU, BBH, GSM8K, HumanEval, MBPP")
    text = "directory with mbpp.jsonl, mmlu/, bbh/, gsm8k/, or MINT's or InterCode's data/"
    parser.add_argument("--data", default=".", help=text)
    text = "results of Spider, MultiPL-E, DS-1000, for the suite's table"
    parser.add_argument("--scores", default="", metavar="NAME=PERCENT,...", help=text)
    parser.add_argument("--include-path", default="", help="directory of task files (YAML) for the harness")
    parser.add_argument("--limit", type=int, help="number of documents of each task")
    parser.add_argument("--skip", type=int, default=0, help="skip this many episodes of each kind")
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    parser.add_argument("--seed", type=int, default=0)
    text = "tokens of an answer or an agent's turn (default: the task's, else 512)"
    parser.add_argument("--max-new-tokens", type=int, help=text)
    _add_agents(parser)
    parser.add_argument("--json", default="", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--html", default="", metavar="FILE", help="also write the episodes as a page")
    traces = add_verb(
        verbs,
        _export_traces,
        "write solved episodes as conversations for fine-tuning",
        "lemur export-traces --traces agents.json --output solved.jsonl",
    )
    traces.add_argument("--traces", required=True, help="what lemur eval --agents --json wrote")
    traces.add_argument("--output", required=True, help="JSON lines for lemur prepare")
    traces.add_argument("--config", default="", help="also make this config's stores, which read the output")
    traces.set_defaults(takes_config=True)


def _add_agents(parser: argparse.ArgumentParser) -> None:
    text = "python, sql, bash, tools, mint, mint-SET, intercode-sql, intercode-bash, or verifiers:TASKSET"
    parser.add_argument("--agents", default="", help=text)
    parser.add_argument("--replay", default="", help="recorded run of MINT or InterCode instead of a model")
    text = "interpreter of the cells in MINT (default: this one); it needs IPython"
    parser.add_argument("--cell-python", default=sys.executable, metavar="PYTHON", help=text)
    text = "episodes at a time (default: of an endpoint 32, of a checkpoint --batch-tokens / 2,048, up to 16)"
    parser.add_argument("--batch", type=int, help=text)
    text = "tokens of the cache that a checkpoint's episodes share, per data-parallel replica"
    parser.add_argument("--batch-tokens", type=int, default=8192, help=text)
    parser.add_argument("--turns", type=int, default=5, help="most turns, where an episode has no limit")
    parser.add_argument("--endpoint", default="", help="OpenAI-compatible URL of an external agent")
    parser.add_argument("--endpoint-model", default="", help="the agent's name there")
    parser.add_argument("--feedback-endpoint", default="", help="URL of a model that gives feedback in MINT")
    parser.add_argument("--feedback-model", default="", help="its name there")


def _eval(args) -> None:
    import json

    from etils import epath

    from lemur_jax.evals.published import parse_scores

    # An exit, so that sandboxes and a database server are stopped and removed too.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    _check_options(args)
    check_output_file("--json", args.json)
    check_output_file("--html", args.html)
    written: dict = {}
    scores = parse_scores(args.scores)  # before a checkpoint is opened
    tasks = [task for task in args.tasks.split(",") if task]
    needs_session = tasks or args.suite or not (args.endpoint or args.replay)
    if needs_session and not args.checkpoint:
        raise UserError("name a --checkpoint; agents alone can have an --endpoint or a --replay instead")
    if args.replay and not args.agents:
        raise UserError("--replay needs --agents mint, mint-SET, intercode-sql or intercode-bash")
    if args.agents and "://" in args.json:
        raise UserError(f"--json {args.json} of --agents must be local: finished episodes are kept beside it")

    if args.agents and not args.replay:
        from lemur_jax.agents.episodes import check_kinds

        check_kinds(args.agents.split(","))

    def check(tokenizer) -> None:
        from lemur_jax.evals.benchmarks import check_tasks
        from lemur_jax.text.chat_template import chat_template

        check_tasks(tasks, _options(args))
        if args.agents and not (args.endpoint or args.replay):
            chat_template(tokenizer)

    with open_session(args, check) if needs_session else contextlib.nullcontext() as session:
        try:
            if tasks or args.suite or not args.agents:
                _benchmarks(args, session, tasks, scores, written)
            if args.agents:
                _agents(args, session, written)
        finally:
            # A task or an endpoint that fails, or Ctrl-C, does not lose finished work.
            if args.json and written and _is_primary():
                written["run"] = _record(args, session)
                epath.Path(args.json).write_text(json.dumps(written, indent=1))
    # All is in the JSON file now. A leftover journal would be reused for a checkpoint that has been trained further.
    if args.agents and args.json and not args.replay and _is_primary():
        pathlib.Path(_journal_path(args)).unlink(missing_ok=True)


def _check_options(args) -> None:
    for name in ("limit", "max_new_tokens", "batch", "batch_tokens", "turns"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if args.feedback_endpoint and "mint" not in args.agents:
        raise UserError("--feedback-endpoint is for --agents mint: leave it out")
    if args.skip < 0:
        raise UserError(f"--skip is {args.skip}: it must be at least 0")
    if args.skip and (args.replay or not args.agents):
        raise UserError("--skip is for --agents that play: leave it out")
    pairs = (("html", "agents"), ("scores", "suite"), ("endpoint", "agents"), ("endpoint_model", "endpoint"))
    for name, other in (*pairs, ("feedback_model", "feedback_endpoint")):
        if getattr(args, name) and not getattr(args, other):
            name, other = (f"--{word.replace('_', '-')}" for word in (name, other))
            raise UserError(f"{name} has no effect without {other}: leave it out, or name {other}")


def _is_primary() -> bool:
    """Whether this host writes; without devices, which an endpoint or a replay does not touch."""
    return coordination.process()[0] == 0


def _record(args, session) -> dict:
    """What results depend on: all options, also those by default, the checkpoint's step, and versions."""
    from lemur_jax.telemetry.provenance import git_commit, versions

    options = {name: value for name, value in vars(args).items() if isinstance(value, str | int | None)}
    step = session.step if session else None
    return {"options": options, "step": step, "commit": git_commit(), "versions": versions()}


def _journal_path(args) -> str:
    return f"{args.json}.episodes.jsonl"


def _benchmarks(args, session, tasks: list[str], scores: dict[str, float], written: dict) -> None:
    from lemur_jax.evals.benchmarks import evaluate, format_results, to_json

    results: list = []
    try:
        results.extend(evaluate(session, tasks, _options(args), suite=args.suite, scores=scores))
    finally:
        if results and _is_primary():  # every host has found the same
            print(format_results(results, args.checkpoint))
            written |= to_json(results, args.checkpoint)


def _options(args):
    from lemur_jax.evals.benchmarks import Options

    return Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})


def _agents(args, session, written: dict) -> None:
    from lemur_jax.agents import episodes, runner

    names = args.agents.split(",")
    limit = args.max_new_tokens or 512
    local_agent = None
    if not (args.endpoint or args.replay):
        local_agent = episodes.SessionAgent(session, max_new_tokens=limit, batch_tokens=args.batch_tokens)
    if not _is_primary():  # the first host plays
        return local_agent.follow() if local_agent else None
    if args.replay:
        replay_path = pathlib.Path(args.replay)
        # Of .../MODEL/F=None and .../MODEL/RUN.json the name is the model's.
        in_folder = replay_path.suffix or "=" in replay_path.name
        name = f"replay of {replay_path.parent.name if in_folder else replay_path.name}"
        return _write_agents(args, name, _replay(args, names), written)
    path = pathlib.Path(_journal_path(args)) if args.json else None
    name = args.endpoint_model if args.endpoint else args.checkpoint
    step = session.step if local_agent else None  # on resuming, the newest step may be another one
    run = {"agents": args.agents, "agent": name, "endpoint": args.endpoint, "step": step}
    run |= {"turns": args.turns, "max_new_tokens": limit, "dtype": args.dtype, "weights": args.weights}
    run["cell_python"] = args.cell_python
    if "mint" in args.agents or "intercode" in args.agents:
        run["data"] = str(pathlib.Path(args.data).resolve())
    if args.feedback_endpoint:
        run["feedback"] = args.feedback_model
    journal, traces = runner.Journal(path, run), None
    try:
        traces = _play(args, names, local_agent, journal, limit)
        if local_agent:
            local_agent.end()  # not after an error: the watchdog of the others ends them with its reason
    finally:
        journal.close()
        if traces is None:  # an error: those that an earlier run has played are shown too
            traces = list(journal.traces.values())
        if traces:
            _write_agents(args, name, traces, written)


def _play(args, names: list[str], local_agent, journal, limit: int) -> list:
    """The episodes of environments by the agent of a checkpoint, `local_agent`, or an endpoint."""
    from lemur_jax.agents import episodes, runner

    agent = local_agent or episodes.endpoint_agent(args.endpoint, args.endpoint_model, max_new_tokens=limit)
    batch = args.batch or (local_agent.default_batch if local_agent else ENDPOINT_BATCH)
    expert = None
    if args.feedback_endpoint:
        expert = episodes.endpoint_agent(
            args.feedback_endpoint, args.feedback_model, max_new_tokens=limit, stops=episodes.EXPERT_STOPS
        )
    with contextlib.ExitStack() as stack:
        environments = episodes.open_environments(
            names, args.limit, args.data, stack, expert, args.cell_python, args.skip
        )
        return runner.run_episodes(environments, agent, max_turns=args.turns, batch=batch, journal=journal)


def _replay(args, names: list[str]) -> list:
    from lemur_jax.agents.replay import format_replay, replay_run

    with contextlib.ExitStack() as stack:
        runs = replay_run(names, args.data, args.replay, args.limit, stack, args.cell_python)
        for name, replayed in runs.items():
            print(format_replay(name, replayed))
    return [episode.trace for replayed in runs.values() for episode in replayed]


def _write_agents(args, name: str, traces: list, written: dict) -> None:
    from etils import epath

    from lemur_jax.agents import episodes
    from lemur_jax.agents.page import agents_page
    from lemur_jax.evals.published import format_agents

    # InterCode's protocol has more turns than the option's default.
    turns = max([args.turns, *(len(trace.turns) for trace in traces)])
    print(episodes.format_episodes(traces, turns))
    if scores := episodes.paper_scores(traces):
        print(format_agents(scores, name))
    written["agents"] = episodes.to_json(traces, turns)
    if args.html:
        epath.Path(args.html).write_text(agents_page(traces, turns, name))


def _export_traces(args) -> None:
    import json

    from lemur_jax.agents.episodes import conversations, from_json

    if args.overrides and not args.config:
        raise UserError(f"{args.overrides[0]} changes a config: name it with --config")
    try:
        with open(args.traces) as file:
            traces = [from_json(trace) for trace in json.load(file)["agents"]["traces"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{args.traces} is not what lemur eval --agents --json writes ({error!r})") from error
    solved = conversations(traces)
    pathlib.Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w") as file:
        file.writelines(json.dumps(conversation) + "\n" for conversation in solved)
    print(f"{args.output}: {len(solved)} solved episodes of {len(traces)}")
    if args.config:
        from lemur_jax.config import load
        from lemur_jax.prepare.prepare import prepare

        prepare(load(args.config, args.overrides), replace=True)
