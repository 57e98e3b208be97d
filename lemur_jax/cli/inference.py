"""Inference from a checkpoint: `generate`, `chat`, `smoke`, `serve`."""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence

from lemur_jax.cli.arguments import (
    Verbs,
    add_checkpoint,
    add_verb,
    check_texts,
    open_session,
    require_single_host,
)
from lemur_jax.common.errors import UserError


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _generate,
        "continue prompts",
        'lemur generate --checkpoint quickstart/smollm2/lemur --prompt "def fibonacci(n):"',
    )
    _add_inference(parser)
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    text = (
        "below each text a line for each new token, stop token included: log-probability in nats, id, token"
    )
    parser.add_argument("--logprobs", action="store_true", help=text)

    parser = add_verb(verbs, _chat, "talk to a chat model", "lemur chat --checkpoint quickstart/smollm2/chat")
    _add_inference(parser)
    parser.add_argument("--prompt", action="append", help="ask this and stop; default: start a conversation")
    parser.add_argument("--system", default="", help="system message")
    _add_template_kwargs(parser)

    parser = add_verb(
        verbs,
        _smoke,
        "sharded inference smoke test: load, generate, compare, time",
        "lemur smoke --checkpoint quickstart/smollm2/chat --virtual-devices 6 --mesh fsdp=2,tensor=3",
    )
    add_checkpoint(parser)
    parser.add_argument("--hf", default="", help="export directory: compare with transformers' greedy tokens")
    parser.add_argument("--reference", metavar="FILE", help="compare with what --write-reference has written")
    parser.add_argument("--write-reference", metavar="FILE", help="keep what is generated; FILE must be new")

    parser = add_verb(
        verbs,
        _serve,
        "answer OpenAI's client: a small endpoint for smoke tests",
        "lemur serve --checkpoint quickstart/smollm2/chat",
    )
    add_checkpoint(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone can reach it")
    parser.add_argument("--port", type=int, default=8000)
    _add_template_kwargs(parser)


def _generate(args) -> None:
    def check(tokenizer) -> None:
        check_texts("--prompt", args.prompt)
        _sampling(args)

    with open_session(args, check) as session:
        from lemur_jax.cluster import hosts
        from lemur_jax.infer.generate import generate
        from lemur_jax.infer.text import continuation
        from lemur_jax.text.chat_template import stop_ids

        tokenizer = session.need_tokenizer()
        prompts = [tokenizer.encode_prompt(prompt) for prompt in args.prompt]
        completions = generate(
            session,
            prompts,
            max_new_tokens=args.max_new_tokens,
            stop_ids=stop_ids(tokenizer),
            sampling=_sampling(args),
            seeds=prompt_seeds(args.prompt),
        )
        for text, prompt, completion in zip(args.prompt, prompts, completions, strict=True):
            if not hosts.is_primary():
                break  # every host has computed the same
            print(text + continuation(tokenizer, prompt, completion.content))
            if args.logprobs:
                for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
                    print(f"{logprob:.4f}\t{token}\t{json.dumps(tokenizer.token(token), ensure_ascii=False)}")


def prompt_seeds(prompts: Sequence[str]) -> list[int]:
    """A seed for each prompt, from its text and how often it came before, so that other prompts change no answer."""
    counts: collections.Counter[str] = collections.Counter()
    seeds = []
    for prompt in prompts:
        text = f"{counts[prompt]} {prompt}"
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
        counts[prompt] += 1
    return seeds


def _chat(args) -> None:
    def options():
        from lemur_jax.infer.chat import Options

        limit, kwargs = args.max_new_tokens, _template_kwargs(args)
        return Options(max_new_tokens=limit, sampling=_sampling(args), chat_template_kwargs=kwargs)

    def check(tokenizer) -> None:
        if not args.prompt:
            require_single_host("a conversation cannot be typed into several hosts: give --prompt")
        check_texts("--prompt", args.prompt or [])
        check_texts("--system", [args.system])
        options().encode(tokenizer, [{"role": "user", "content": "-"}])

    with open_session(args, check) as session:
        from lemur_jax.cluster import hosts
        from lemur_jax.infer.chat import HELP, converse

        def read_input():
            sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 does not end the conversation
            print(HELP)
            while True:
                try:
                    yield input("> ")
                except (EOFError, KeyboardInterrupt):
                    print()
                    return

        converse(
            session,
            args.prompt or read_input(),
            lambda text: print(text, end="", flush=True) if hosts.is_primary() else None,
            options(),
            system=args.system,
            continue_on_error=not args.prompt,
        )


def _smoke(args) -> None:
    stored = None

    def check(tokenizer) -> None:  # before the weights are loaded, which can take minutes
        from etils import epath

        from lemur_jax.infer.smoke import check_hf, check_reference, read_reference

        nonlocal stored
        if args.write_reference is not None and epath.Path(args.write_reference).exists():
            raise UserError(f"{args.write_reference} exists already: remove it to write a new reference")
        if args.hf:
            check_hf(args.hf, args.dtype, args.weights)
        if args.reference is not None:
            stored = read_reference(args.reference)
            check_reference(stored, args.dtype, args.weights, tokenizer)

    with open_session(args, check) as session:
        from lemur_jax.cluster import hosts
        from lemur_jax.infer.smoke import smoke, write_reference

        result = smoke(session, args.hf, stored)
        if args.write_reference is not None and hosts.is_primary():
            write_reference(args.write_reference, result)
            print(f"reference written to {args.write_reference}")


def _serve(args) -> None:
    sockets, kwargs = [], _template_kwargs(args)

    def check(tokenizer) -> None:
        from lemur_jax.infer.chat import Options
        from lemur_jax.infer.serve import listen

        if kwargs:
            Options(chat_template_kwargs=kwargs).encode(tokenizer, [{"role": "user", "content": "-"}])
        require_single_host("requests would come to one of several hosts: serve from one host")
        sockets.append(listen(args.host, args.port))

    with open_session(args, check) as session:
        from lemur_jax.infer.serve import serve

        name = os.path.basename(os.path.normpath(args.checkpoint))
        serve(session, name, sockets[0], host=args.host, chat_template_kwargs=kwargs)


def _add_template_kwargs(parser: argparse.ArgumentParser) -> None:
    text = "variables of the chat template, e.g. '{\"enable_thinking\": false}'"
    parser.add_argument("--chat-template-kwargs", default="{}", metavar="JSON", help=text)


def _template_kwargs(args) -> dict:
    try:
        kwargs = json.loads(args.chat_template_kwargs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--chat-template-kwargs is not JSON: {error}") from error
    if not isinstance(kwargs, dict):
        raise UserError(f"--chat-template-kwargs is {kwargs!r:.50}, not an object")
    return kwargs


def _sampling(args):
    from lemur_jax.infer.sampling import Sampling

    if args.temperature == 0 and (args.top_k or args.top_p != 1 or args.min_p):
        raise UserError("--top-k, --top-p and --min-p change what is drawn: give a --temperature above 0 too")
    return Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})


def _add_inference(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="most probable tokens to draw from; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="probability mass to draw from")
    parser.add_argument("--min-p", type=float, default=0.0, help="least probability, relative to the largest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="as in transformers; 1: off")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
