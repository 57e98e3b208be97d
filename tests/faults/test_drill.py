"""One fault of every kind; the long drill is a command, see README.md."""

import os

from tests.faults.drill import drill
from tests.faults.faults import ENDS


def test_one_fault_of_every_kind(tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # shown when it fails
    drill(tmp_path, seed, list(ENDS))
