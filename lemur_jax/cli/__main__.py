import sys

from lemur_jax.cli import main

sys.exit(main())
