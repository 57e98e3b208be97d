"""The console command `lemur`: one verb a job. A verb's room is imported only when it is called."""

import argparse
import os
import sys
from collections.abc import Sequence

from lemur_jax.common.errors import UserError

_CONFIG_HELP = "config file, optionally with an argument: path.py or path.py:arg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
      0, or 2 for a mistake that the user can mend, or 130 when interrupted, or 75 when another host was
      lost and where a launcher is to start an unfinished run again (`parallel/liveness.py`).
    """
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    try:
        known.overrides = _overrides(rest, known.verb in ("prepare", "inspect", "plan", "train", "doctor"))
        return known.run(known) or 0
    except UserError as error:
        print(f"lemur {known.verb}: {error}", file=sys.stderr)
        _leave_other_hosts(2)
        return 2
    except KeyboardInterrupt:
        print(
            f"lemur {known.verb}: interrupted; the same command goes on from what is finished",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`lemur inspect ... | head`).
        sys.stderr.close()
        return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lemur",
        description="Pretrain, tune, convert and run Llama models in JAX, from one machine to a TPU pod.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, run, summary, example):
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = verb(
        "prepare",
        _prepare,
        "read a config's tasks once and write token stores",
        "lemur prepare --config configs/quickstart_base.py",
    )
    sub.add_argument("--config", required=True, help=_CONFIG_HELP)

    sub = verb(
        "inspect",
        _inspect,
        "show what is in a token store, or what a config would train on",
        "lemur inspect quickstart/stores/python_chat/train --tokenizer quickstart/tokenizer_chat",
    )
    sub.add_argument("target", help="a token store, or a config file (path.py or path.py:arg)")
    sub.add_argument(
        "--tokenizer", default="", help="directory of a store's tokenizer, to show text instead of ids"
    )
    sub.add_argument(
        "--samples", type=int, default=2, help="documents, or rows a source, to show (default 2)"
    )
    sub.add_argument("--html", default="", metavar="FILE", help="write a page instead of printing")

    sub = verb(
        "plan",
        _plan,
        "compile a config's update for a TPU slice, without one: does it fit, how fast is it (an estimate)",
        "lemur plan --config configs/quickstart_lemur.py --topology v5e-1",
    )
    sub.add_argument("--config", required=True, help=_CONFIG_HELP)
    sub.add_argument("--topology", required=True, help="e.g. v4-512, v5e-256, v5p-128, v6e-64, tpu7x-64")
    sub.add_argument("--slices", type=int, default=1, help="slices joined by the data-centre network")
    sub.add_argument("--json", default="", metavar="FILE", help="also write the plan as JSON")
    sub.add_argument(
        "--hlo", default="", metavar="FILE", help="also write the optimized HLO text of the update"
    )

    sub = verb(
        "train",
        _train,
        "train or resume; pretraining and chat tuning alike",
        "lemur train --config configs/quickstart_base.py --workdir quickstart/runs/base",
    )
    sub.add_argument("--config", required=True, help=_CONFIG_HELP)
    sub.add_argument("--workdir", required=True, help="directory of the run, local or gs://")
    _add_devices(sub)

    sub = verb(
        "doctor",
        _doctor,
        "look at everything that a run needs, on every host, before the run",
        "lemur doctor --config configs/quickstart_base.py --workdir quickstart/runs/base",
    )
    sub.add_argument("--config", required=True, help=_CONFIG_HELP)
    sub.add_argument("--workdir", required=True, help="directory of the run; left as it is")
    _add_devices(sub)

    sub = verb(
        "import-hf",
        _import_hf,
        "make a checkpoint of a Hugging Face directory",
        "lemur import-hf quickstart/hf/base quickstart/imported",
    )
    sub.add_argument("hf_dir", help="directory with config.json and safetensors")
    sub.add_argument("checkpoint", help="checkpoint directory to make")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")

    sub = verb(
        "export-hf",
        _export_hf,
        "make a Hugging Face directory of a checkpoint",
        "lemur export-hf quickstart/runs/chat quickstart/hf/chat --dtype float32",
    )
    sub.add_argument("checkpoint", help="checkpoint directory or workdir")
    sub.add_argument("hf_dir", help="directory to make")
    sub.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    sub.add_argument("--step", type=int, help="default: the newest")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")

    sub = verb(
        "checkpoints",
        _checkpoints,
        "list the checkpoints of a run and verify every byte of them",
        "lemur checkpoints quickstart/runs/base",
    )
    sub.add_argument("workdir", help="workdir or checkpoint directory")
    sub.add_argument(
        "--diff", type=int, nargs=2, metavar="STEP", help="instead: config keys in which two steps differ"
    )

    sub = verb(
        "generate",
        _generate,
        "continue prompts",
        'lemur generate --checkpoint quickstart/runs/lemur --prompt "def fibonacci(n):"',
    )
    _add_inference(sub)
    sub.add_argument("--prompt", action="append", required=True, help="may be given several times")

    sub = verb("chat", _chat, "talk to a chat model", "lemur chat --checkpoint quickstart/runs/chat")
    _add_inference(sub)
    sub.add_argument("--prompt", action="append", help="ask this and stop; without it, a conversation starts")
    sub.add_argument("--system", default="", help="system message")

    sub = verb(
        "smoke",
        _smoke,
        "sharded inference smoke test: load, generate, compare, time",
        "lemur smoke --checkpoint quickstart/runs/chat --virtual-devices 8 --mesh fsdp=4,tensor=2",
    )
    sub.add_argument("--checkpoint", required=True, help="checkpoint directory or workdir")
    sub.add_argument("--step", type=int, help="default: the newest")
    sub.add_argument("--mesh", default="", help="e.g. fsdp=4,tensor=2; default: all devices fsdp")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    sub.add_argument("--hf", default="", help="exported directory: compare with transformers' greedy tokens")
    _add_devices(sub)

    sub = verb(
        "eval",
        _eval,
        "run benchmarks: HumanEval and MBPP in a sandbox, all others through lm-evaluation-harness",
        "lemur eval --checkpoint quickstart/runs/lemur --tasks humaneval --limit 8",
    )
    _add_checkpoint(sub, required=False)
    sub.add_argument("--tasks", default="", help="names with commas: humaneval, mbpp, or the harness's")
    sub.add_argument("--suite", default="", help="paper: MMLU, BBH, GSM8K, HumanEval and MBPP")
    sub.add_argument("--data", default=".", help="directory with mbpp.jsonl")
    sub.add_argument("--include-path", default="", help="directory of task files (YAML) for the harness")
    sub.add_argument("--limit", type=int, help="only so many documents of each task")
    sub.add_argument("--chat", action="store_true", help="apply the chat template in the harness's tasks")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--agents", default="", help="episodes with environments: python, sql, bash")
    sub.add_argument("--turns", type=int, default=5, help="turns of an episode at most (default 5)")
    sub.add_argument("--endpoint", default="", help="OpenAI-compatible URL of the agent, not the checkpoint")
    sub.add_argument("--endpoint-model", default="", help="the agent's name there")
    sub.add_argument("--json", default="", metavar="FILE", help="also write everything as JSON")

    sub = verb(
        "serve",
        _serve,
        "answer OpenAI's client: a small endpoint for smoke tests",
        "lemur serve --checkpoint quickstart/runs/chat",
    )
    _add_checkpoint(sub)
    sub.add_argument("--host", default="127.0.0.1", help="default: this machine alone can reach it")
    sub.add_argument("--port", type=int, default=8000)

    sub = verb(
        "report",
        _report,
        "draw runs as one HTML page",
        "lemur report quickstart/runs/base quickstart/runs/lemur quickstart/runs/chat",
    )
    sub.add_argument("workdirs", nargs="+", help="workdirs in the order of their stages")
    sub.add_argument("--output", default="report.html", help="file to write (default report.html)")
    sub.add_argument("--table", action="store_true", help="also print the table of bits per byte")
    return parser


def _add_devices(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--virtual-devices",
        type=int,
        default=0,
        metavar="N",
        help="run on N virtual CPU devices instead of hardware",
    )


def _add_checkpoint(sub: argparse.ArgumentParser, required: bool = True) -> None:
    sub.add_argument("--checkpoint", required=required, default="", help="checkpoint directory or workdir")
    sub.add_argument("--step", type=int, help="default: the newest")
    sub.add_argument("--mesh", default="", help="e.g. fsdp=4,tensor=2; default: all devices fsdp")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    _add_devices(sub)


def _add_inference(sub: argparse.ArgumentParser) -> None:
    _add_checkpoint(sub)
    sub.add_argument("--max-new-tokens", type=int, default=128)
    sub.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    sub.add_argument("--top-k", type=int, default=0, help="0: off")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--min-p", type=float, default=0.0)
    sub.add_argument("--repetition-penalty", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)


def _prepare(args) -> None:
    from lemur_jax.common.config import load

    config = load(args.config, args.overrides)
    from lemur_jax.data.prepare import prepare
    from lemur_jax.telemetry.progress import Progress

    prepare(config, progress=Progress)


def _inspect(args) -> None:
    from lemur_jax.data.inspect import inspect_config, inspect_store, page

    show = {"samples": args.samples, "color": bool(args.html) or sys.stdout.isatty()}
    if args.target.partition(":")[0].endswith(".py"):
        from lemur_jax.common.config import load

        text = inspect_config(load(args.target, args.overrides), **show)
    else:
        from lemur_jax.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
        text = inspect_store(args.target, tokenizer=tokenizer, **show)
    if args.html:
        from etils import epath

        epath.Path(args.html).write_text(page(args.target, text))
        text = f"wrote {args.html}"
    print(text)


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


def _train(args) -> int:
    from lemur_jax.common.config import fingerprint, load

    config = load(args.config, args.overrides)
    _start_jax(args, config.hosts.connect_seconds, config.hosts.lost_seconds)
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
    _start_jax(args, config.hosts.connect_seconds, config.hosts.lost_seconds)
    from lemur_jax.parallel import liveness
    from lemur_jax.train.doctor import doctor

    with liveness.watched(config.hosts.lost_seconds):
        doctor(config, args.workdir)


def _import_hf(args) -> None:
    _start_jax(args)
    from lemur_jax.convert.import_hf import import_hf
    from lemur_jax.convert.memory import keep_freed_memory

    keep_freed_memory()
    import_hf(args.hf_dir, args.checkpoint, dtype=args.dtype, overwrite=args.overwrite)


def _export_hf(args) -> None:
    _start_jax(args)
    from lemur_jax.convert.export_hf import export_hf
    from lemur_jax.convert.memory import keep_freed_memory

    keep_freed_memory()
    export_hf(args.checkpoint, args.hf_dir, dtype=args.dtype, step=args.step, overwrite=args.overwrite)


def _checkpoints(args) -> None:
    _start_jax(args)
    from lemur_jax.checkpoint.listing import difference, table

    print(difference(args.workdir, *args.diff) if args.diff else table(args.workdir))


def _generate(args) -> None:
    session = _session(args)
    from lemur_jax.infer.generate import generate
    from lemur_jax.infer.session import stop_ids
    from lemur_jax.infer.text import continuation
    from lemur_jax.parallel import hosts

    tokenizer = session.need_tokenizer()
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in args.prompt]
    completions = generate(
        session,
        prompts,
        max_new_tokens=args.max_new_tokens,
        stop_ids=stop_ids(tokenizer),
        sampling=_sampling(args),
    )
    for text, prompt, completion in zip(args.prompt, prompts, completions, strict=True):
        if not hosts.is_chief():
            break  # every host has computed the same
        print(text + continuation(tokenizer, prompt, completion.content))


def _chat(args) -> None:
    session = _session(args)
    from lemur_jax.infer.chat import HELP, converse
    from lemur_jax.parallel import hosts

    if not args.prompt and session.mesh.is_multi_process:
        raise UserError("a conversation cannot be typed into several hosts: give --prompt")

    def typed():
        print(HELP)
        while True:
            try:
                yield input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return

    converse(
        session,
        args.prompt or typed(),
        lambda text: print(text, end="", flush=True) if hosts.is_chief() else None,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        sampling=_sampling(args),
    )


def _smoke(args) -> None:
    session = _session(args)
    from lemur_jax.infer.smoke import smoke

    smoke(session, args.hf)


def _eval(args) -> None:
    import json

    written: dict = {}
    tasks = [task for task in args.tasks.split(",") if task]
    needs_session = tasks or args.suite or not args.endpoint
    if needs_session and not args.checkpoint:
        raise UserError("name a --checkpoint; agents alone can have an --endpoint instead")
    session = _session(args) if needs_session else None
    if tasks or args.suite or not args.agents:
        from lemur_jax.evals.benchmarks import evaluate, table, to_json

        found = evaluate(
            session,
            tasks,
            suite=args.suite,
            data=args.data,
            include_path=args.include_path,
            limit=args.limit,
            chat=args.chat,
            seed=args.seed,
        )
        print(table(found, args.checkpoint))
        written |= json.loads(to_json(found, args.checkpoint))
    if args.agents:
        from lemur_jax.evals.agents import episodes

        agent = (
            episodes.endpoint_agent(args.endpoint, args.endpoint_model)
            if args.endpoint
            else episodes.session_agent(session)
        )
        worlds = episodes.open_environments(args.agents.split(","), args.limit)
        traces = [episodes.run_episode(world, agent, max_turns=args.turns) for world in worlds]
        print(episodes.table(traces, args.turns))
        written["agents"] = json.loads(episodes.to_json(traces, args.turns))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(written, file, indent=1)


def _serve(args) -> None:
    session = _session(args)
    from lemur_jax.evals.serve import serve

    serve(session, os.path.basename(os.path.normpath(args.checkpoint)), host=args.host, port=args.port)


def _session(args):
    """The checkpoint on the mesh that the arguments say."""
    _start_jax(args)
    from lemur_jax.infer.session import load
    from lemur_jax.parallel.mesh import parse_mesh

    return load(args.checkpoint, parse_mesh(args.mesh), args.dtype, args.step)


def _sampling(args):
    from lemur_jax.infer.sampling import Sampling

    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def _report(args) -> None:
    from lemur_jax.report.page import bits_per_byte_table, report

    path = report(args.workdirs, args.output)
    if args.table:
        print(bits_per_byte_table(args.workdirs))
    print(f"wrote {path}")


def _start_jax(args, *seconds: int) -> None:
    """Settles platform, devices and hosts (`hosts.join(*seconds)`) before anything imports JAX."""
    from lemur_jax.parallel import hosts

    hosts.choose_platform(getattr(args, "virtual_devices", 0))
    hosts.join(*seconds)


def _leave_other_hosts(status: int) -> None:
    """Ends a process of several without the goodbye of `jax.distributed`.

    That waits for hosts that may wait in a collective for this one, and then aborts with a status of its own.
    """
    if "lemur_jax.parallel.liveness" in sys.modules:
        from lemur_jax.parallel import liveness

        if liveness.client() is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
