"""Hugging Face both ways: `import-hf`, `export-hf`."""

import argparse
import math

from lemur_jax.cli.arguments import LOST_SECONDS, Verbs, add_verb, start_jax
from lemur_jax.common.errors import UserError


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        _import_hf,
        "make a checkpoint of a Hugging Face directory or a GGUF file",
        "lemur import-hf quickstart/smollm2/base quickstart/smollm2/imported",
    )
    parser.add_argument("hf_dir", help="directory with safetensors, GGUF file, or ORG/NAME[@REVISION]")
    parser.add_argument("checkpoint", help="checkpoint directory to make")
    _add_options(parser, dtype="float32")

    parser = add_verb(
        verbs,
        _export_hf,
        "make a Hugging Face directory of a checkpoint",
        "lemur export-hf quickstart/smollm2/chat quickstart/smollm2/hf --dtype float32",
    )
    parser.add_argument("checkpoint", help="checkpoint directory or workdir")
    parser.add_argument("hf_dir", help="directory to make")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, for PEFT")
    text = "compare all tensors with the checkpoint, and transformers' logits on up to 512 tokens"
    parser.add_argument("--verify", action="store_true", help=text)
    _add_options(parser, dtype="bfloat16")


def _add_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--dtype", default=dtype, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    group = parser.add_argument_group(
        "vocabulary", "rows and tokenizer files are changed together, in this order"
    )
    text = "drop ids from ID on (default: none)"
    group.add_argument("--drop-rows-above", type=int, default=0, metavar="ID", help=text)
    group.add_argument("--add-tokens", default="", metavar="A,B", help="control tokens for the next ids")
    text = "rows after the changes; new ones are the mean of the others"
    group.add_argument("--vocab-size", type=int, default=0, metavar="V", help=text)


def _change(args):
    from lemur_jax.convert.vocabulary import Change

    tokens = tuple(name.strip() for name in args.add_tokens.split(",")) if args.add_tokens else ()
    if not all(tokens) or min(args.drop_rows_above, args.vocab_size) < 0:
        raise UserError("--add-tokens takes names with commas between, the other two numbers 0 or above")
    return Change(drop_rows_above=args.drop_rows_above, add_tokens=tokens, vocab_size=args.vocab_size)


def _import_hf(args) -> None:
    start_jax(args)
    from lemur_jax.cluster import coordination
    from lemur_jax.common.hub import local_model
    from lemur_jax.convert.import_hf import import_hf

    if coordination.process()[1] > 1:
        raise UserError("import-hf works on one host: run it on one alone, any mesh can read what it makes")
    change = _change(args)
    source = local_model(args.hf_dir)
    model = import_hf(source, args.checkpoint, dtype=args.dtype, overwrite=args.overwrite, change=change)
    print(_done(args.checkpoint, model, args.dtype))


def _export_hf(args) -> None:
    start_jax(args)
    from lemur_jax.cluster import coordination, hosts
    from lemur_jax.cluster.watchdog import host_watchdog
    from lemur_jax.convert.export_hf import export_hf
    from lemur_jax.convert.peft import export_peft

    if args.adapter and (args.verify or args.add_tokens or args.drop_rows_above or args.vocab_size):
        raise UserError("--adapter writes the adapter alone: leave out --verify and the vocabulary options")
    # With several hosts, the first one writes and the others wait for it.
    with host_watchdog(LOST_SECONDS):
        if hosts.is_primary():
            with hosts.alone():
                options = {"dtype": args.dtype, "step": args.step, "overwrite": args.overwrite}
                if args.adapter:
                    export_peft(args.checkpoint, args.hf_dir, **options)
                    print(f"{args.hf_dir}: a PEFT adapter in {args.dtype}")
                else:
                    model = export_hf(
                        args.checkpoint, args.hf_dir, change=_change(args), verify=args.verify, **options
                    )
                    print(_done(args.hf_dir, model, args.dtype))
        coordination.barrier("export", math.inf)


def _done(path: str, model, dtype: str) -> str:
    from lemur_jax.models.decoder import num_params

    return f"{path}: {num_params(model) / 1e6:,.1f}M parameters in {dtype}, vocabulary {model.vocab_size:,}"
