"""The table against the model's own parameter tree, and element by element."""

import numpy as np

from lemur_jax.convert import layout
from lemur_jax.models.presets import preset


def test_one_head_channel_lands_where_hugging_face_has_it():
    config = preset("tiny")
    H, N, D = config.num_attention_heads, config.head_dim, config.hidden_size
    rows = {weight.path: weight for weight in layout.weights(config)}
    q_proj = np.arange(H * N * D).reshape(H * N, D)
    query = rows["layers/attention/query"].from_hf(q_proj)
    assert query[5, 2, 3] == q_proj[2 * N + 3, 5]
    o_proj = np.arange(D * H * N).reshape(D, H * N)
    out = rows["layers/attention/out"].from_hf(o_proj)
    assert out[2, 3, 5] == o_proj[5, 2 * N + 3]


def test_both_directions_are_views_and_inverse():
    for weight in layout.weights(preset("tiny")):
        tensor = np.random.default_rng(0).normal(size=weight.hf_shape)
        ours = weight.from_hf(tensor)
        assert ours.shape == (weight.shape[1:] if weight.lead else weight.shape)
        assert np.shares_memory(ours, tensor)
        np.testing.assert_array_equal(weight.to_hf(np.ascontiguousarray(ours)), tensor)
        # Export must not copy before it casts, or a float32 twin of each tensor exists for a while.
        assert np.shares_memory(weight.to_hf(ours), tensor)
