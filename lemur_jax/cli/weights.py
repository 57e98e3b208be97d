"""Hugging Face both ways: `import-hf`, `export-hf`."""

from lemur_jax.cli.arguments import Verbs, add_verb, start_jax


def add_verbs(verbs: Verbs) -> None:
    sub = add_verb(
        verbs,
        "import-hf",
        _import_hf,
        "make a checkpoint of a Hugging Face directory",
        "lemur import-hf quickstart/hf/base quickstart/imported",
    )
    sub.add_argument("hf_dir", help="directory with config.json and safetensors")
    sub.add_argument("checkpoint", help="checkpoint directory to make")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")

    sub = add_verb(
        verbs,
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


def _import_hf(args) -> None:
    start_jax(args)
    from lemur_jax.convert.import_hf import import_hf
    from lemur_jax.convert.memory import keep_freed_memory

    keep_freed_memory()
    import_hf(args.hf_dir, args.checkpoint, dtype=args.dtype, overwrite=args.overwrite)


def _export_hf(args) -> None:
    start_jax(args)
    from lemur_jax.convert.export_hf import export_hf
    from lemur_jax.convert.memory import keep_freed_memory

    keep_freed_memory()
    export_hf(args.checkpoint, args.hf_dir, dtype=args.dtype, step=args.step, overwrite=args.overwrite)
