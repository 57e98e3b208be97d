"""What the backward pass keeps of each layer, by name; the rest is computed again.

Under every policy a layer keeps its input, `layer_in` of D elements a token. What else can be kept, and what
that saves from being computed again (D model, H query heads, K key heads, N head width, F mlp):

    attention_out  H·N, and H float32 of softmax statistics: the attention kernel's forward pass
    query          H·N: the query product and its rotation
    key_value      2K·N: the key and value products and the rotation
    residual       D: the output product
    gate, up       F each: the gate and the up product of the mlp, the largest
    gate_part      the share `config.compute.gate_share` of the gate, whose rest is `gate` then: to use the memory,
                   or the bandwidth to the host, that a policy leaves

The policies that offload send the big ones to the host's memory while the next layer computes, and keep in HBM
what is small or needed at once.
"""

from collections.abc import Callable

import jax

_policies = jax.checkpoint_policies


def _keep(*names: str) -> Callable:
    return _policies.save_only_these_names("gate_part", *names)


def _to_host(*names: str, keep: tuple[str, ...] = ()) -> Callable:
    """`names` go to the host's memory and come back; `keep` stays in HBM."""
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(keep),
        names_which_can_be_offloaded=["gate_part", *names],
        offload_src="device",
        offload_dst="pinned_host",
    )


_ATTENTION = ("attention_out", "query", "key_value")
# name -> a policy of jax.checkpoint, from most recomputed to nothing recomputed.
POLICIES: dict[str, Callable | None] = {
    # Only the layer's input is kept.
    "full": _keep(),
    # The attention output too: the most expensive thing to compute again for its size.
    "attention": _keep("attention_out"),
    # All that the attention kernels need: of attention only the output product runs twice.
    "attention_all": _keep(*_ATTENTION),
    # Of the products only the mlp's gate and up run twice.
    "mlp": _keep(*_ATTENTION, "residual"),
    # Only the mlp's up product runs twice.
    "mlp_gate": _keep(*_ATTENTION, "residual", "gate"),
    # No product runs twice.
    "mlp_all": _keep(*_ATTENTION, "residual", "gate", "up"),
    # Every projection's output, but nothing of the size of attention scores.
    "dots": _policies.dots_with_no_batch_dims_saveable,
    # As `full`, `attention` and `mlp`, with offloading to the host.
    "offload_full": _to_host("layer_in"),
    "offload_attention": _to_host("layer_in", keep=("attention_out", "key_value")),
    # What the backward pass of a layer needs last goes to the host, so that it comes back in time.
    "offload_mlp": _to_host("layer_in", "query", "attention_out", keep=("residual", "key_value")),
    # Everything named, for hosts with memory to spare.
    "offload_all": _to_host(
        "layer_in", "attention_out", "query", "residual", "gate", "up", keep=("key_value",)
    ),
    # Everything is kept.
    "none": None,
}


def rematerialize(body: Callable, policy: str) -> Callable:
    """`body` with the named policy."""
    if policy == "none":
        return body
    # prevent_cse=False: inside scan the loop itself keeps XLA from undoing the recomputation.
    return jax.checkpoint(body, policy=POLICIES[policy], prevent_cse=False)
