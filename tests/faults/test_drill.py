"""One fault of every kind, in an order of its own each time; the long drill is a command, see README.md."""

import os
import random

import pytest

from tests.faults.drill import drill, faults_of


@pytest.mark.slow  # each fault has a test of its own elsewhere
@pytest.mark.parametrize("verb", ["train", "rl"])
def test_one_fault_of_every_kind(tmp_path, verb):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # shown when it fails
    kinds = faults_of(verb)
    assert drill(tmp_path, seed, random.Random(seed).sample(kinds, len(kinds)), verb=verb) == {}
