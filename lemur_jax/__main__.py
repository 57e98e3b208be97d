"""`lemur` and `python -m lemur_jax`: the command line."""

import os
import sys

# Pages of 2 MiB for large blocks of memory. XLA:CPU allocates the temporary memory of a program anew at each call, and
# with pages of 4 KiB the kernel's work on them takes up to a fourth of a step (docs/benchmarks.md). glibc reads this
# variable when a process starts.
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def main() -> int:
    """Runs the command line; restarts this process with `HUGE_PAGES` first if it has no such setting."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # transformers only reads tokenizers here; it would warn each time that its models need torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from lemur_jax.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
