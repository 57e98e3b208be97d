"""The recipe's configs as they stand, compiled for the slices that their first lines name."""

import pytest

from lemur_jax.config import load
from lemur_jax.plan.plan import plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "topology", "tokens", "rate"),
    [  # rate: at least, in tokens/s/chip, by docs/planner.md and planner_details.md
        ("lemur_7b_chat.py", "v4-32", 16 * 4096, 0),
        ("lemur_7b_pretrain.py", "v4-32", 4_194_304, 3800),
        ("lemur_70b_chat.py", "v4-128", 16 * 4096, 0),
        ("lemur_70b_pretrain.py", "v4-512", 4_194_304, 430),
        ("long_context.py", "v5e-256", 4_194_304, 1200),
        ("long_context.py:128k", "v5e-256", 4_194_304, 500),
    ],
)
def test_the_recipe_fits(tpu_compiler, config, topology, tokens, rate):
    made = plan(load(f"configs/{config}"), topology)
    assert made.fits
    assert made.tokens_per_step == tokens
    assert made.tokens_per_second_per_chip > rate
