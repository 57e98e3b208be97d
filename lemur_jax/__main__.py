"""`python -m lemur_jax`: the command line."""

import sys

from lemur_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
