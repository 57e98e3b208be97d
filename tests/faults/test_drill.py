"""One fault of every kind, in an order of its own each time; the long drill is a command, see README.md."""

import os
import random

from tests.faults.drill import drill
from tests.faults.faults import ENDS


def test_one_fault_of_every_kind(tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # shown when it fails
    drill(tmp_path, seed, random.Random(seed).sample(list(ENDS), len(ENDS)))
