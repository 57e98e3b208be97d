"""The recipe's configs as they stand, compiled for the slices that their first lines name."""

import pytest

from lemur_jax.config import load
from lemur_jax.plan.plan import plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "tokens"),
    [
        ("lemur_7b_chat", "v4-32", 16 * 4096),
        ("lemur_7b_pretrain", "v4-32", 4_194_304),
        ("lemur_70b_chat", "v4-128", 16 * 4096),
        ("lemur_70b_pretrain", "v4-512", 4_194_304),
    ],
)
def test_the_recipe_fits(tpu_compiler, name, topology, tokens):
    made = plan(load(f"configs/{name}.py"), topology)
    assert made.fits
    assert made.tokens_per_step == tokens
