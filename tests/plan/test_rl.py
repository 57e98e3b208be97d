"""Plans of trainer and engine together, compiled by the real TPU compiler."""

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.rl.plan import format_rl_plan, plan_rl

CHANGES = {
    "train.batch_rows": 64, "rl.group_size": 8, "rl.max_turns": 2, "rl.max_new_tokens": 100, "rl.kl": 0.1,
    "mesh.fsdp": 2, "mesh.tensor": 2,
}  # fmt: skip


@pytest.mark.slow
def test_trainer_and_engine_together(tpu_compiler, narrow):
    made = plan_rl(narrow(CHANGES), "v5e-4", prompt_length=256)
    assert made.fits
    hbm = made.update.hbm
    assert hbm["reference"] == hbm["parameters"] == pytest.approx(hbm["optimizer"] / 2, rel=1e-3)
    # Beside the state: weights in bfloat16, the cache of 64 rows and of 16 prompts, and what decode needs.
    cache = made.engine.decode.hbm["kv_cache"]
    least = 4 * hbm["parameters"] + hbm["parameters"] // 2 + cache * 5 // 4
    assert least < made.hbm_sampling < 1.5 * least + 2**28
    # 8 prompts of 256 tokens, then 64 conversations of 384 whose first 128 are known; 128 turns of 100 tokens.
    assert made.prompt_tokens == 8 * 256 + 64 * 256
    assert made.new_tokens == 128 * 100
    assert made.decode_seconds == pytest.approx(made.engine.decode.step_seconds * 200)
    # Chunks of 128 tokens of 16 prompts at a time.
    assert made.prefill_seconds == pytest.approx(made.engine.prefill.step_seconds / 4 * (1 * 2 + 4 * 2))
    text = format_rl_plan(made)
    assert "ESTIMATED step of 64 episodes" in text
    assert text.count("FITS: ") == 4


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 511, "--prompt-length 511 must leave a token for each of the 2 turns of"),
        ({"adapter.rank": 2}, 128, "unset adapter.rank"),
        ({"distill.teacher": "big", "rl.kl": 0.0}, 128, "unset adapter.rank and distill.teacher"),
        ({"rl.group_size": 3}, 128, "it must be a multiple of config.rl.group_size 3"),
    ],
)
def test_plans_that_cannot_be_made(narrow, changes, length, message):
    options = narrow(CHANGES | changes | ({"init.checkpoint": "base"} if changes else {}))
    with pytest.raises(UserError, match=message):
        plan_rl(options, "v5e-4", prompt_length=length)
