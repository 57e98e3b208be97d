"""Which layouts a search may compile, and in which order, without compiling one."""

import types

import pytest

from lemur_jax.config import RunConfig, replace
from lemur_jax.models.config import ComputeConfig
from lemur_jax.models.presets import preset
from lemur_jax.parallel.compiler_flags import SPARSECORE_SUMS
from lemur_jax.plan import analytic, candidates, search, topologies


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few layouts; a test says which policies and shares it is about."""
    monkeypatch.setattr(candidates, "TENSOR_WAYS", (1,))
    monkeypatch.setattr(candidates, "SHARES", (0.0,))
    monkeypatch.setattr(candidates, "REFINEMENTS", ())


def seven_billion(options, **model):
    return replace(RunConfig(model=preset("llama2_7b", **model)), options)


def made_plan(seconds, size=1):
    """What the order of candidates reads of a plan."""
    return types.SimpleNamespace(
        fits=seconds is not None, step_seconds=seconds, hbm_bytes_per_chip=size, chips=1, mesh={"fsdp": 1}
    )


def test_a_value_that_the_config_has_is_not_tried(monkeypatch):
    option = "xla_tpu_scoped_vmem_limit_kib=65536"  # v6e has more
    monkeypatch.setattr(candidates, "REFINEMENTS", [({candidates.OPTIONS: (option,)}, 0.9)])
    best = candidates.Trial(changes={}, bound=None, plan=made_plan(2.0))
    for kind, options, tried in (("TPU v4", (), [1.8]), ("TPU v6 lite", (), []), ("TPU v4", (option,), [])):
        found = candidates.refinements(best, ComputeConfig(compiler_options=options), kind)
        assert [seconds for _, seconds in found] == tried
    monkeypatch.setattr(candidates, "REFINEMENTS", [({"compute.loss_chunk": 0}, 0.9)])
    for chunk, tried in ((512, 1), (0, 0)):
        assert len(list(candidates.refinements(best, ComputeConfig(loss_chunk=chunk), "TPU v4"))) == tried


def test_sums_of_gradients_are_tried_only_where_gradients_are_exchanged(monkeypatch):
    vmem = "xla_tpu_scoped_vmem_limit_kib=65536"
    monkeypatch.setattr(candidates, "REFINEMENTS", [({candidates.OPTIONS: (vmem, *SPARSECORE_SUMS)}, 0.9)])
    of_best = ("xla_a=1", "xla_b=1")
    for kind, options, changes, tried in (  # added to those of the best, and of the config
        ("TPU v5", of_best[:1], {candidates.OPTIONS: of_best}, (*of_best, vmem)),
        ("TPU7x", (), {}, (vmem, *SPARSECORE_SUMS)),
        ("TPU v5", (), {}, (vmem,)),  # SparseCores sum already
        ("TPU v5 lite", (), {}, (vmem,)),  # has no SparseCores
        ("TPU7x", SPARSECORE_SUMS, {}, (*SPARSECORE_SUMS, vmem)),
    ):
        best = candidates.Trial(changes=changes, bound=None, plan=made_plan(2.0))
        ((found, _),) = candidates.refinements(best, ComputeConfig(compiler_options=options), kind)
        assert found.changes == {candidates.OPTIONS: tried}
    # v6e has more VMEM: what is left is no other candidate than the chunk alone.
    both, alone = {candidates.OPTIONS: (vmem,), "compute.loss_chunk": 2048}, {"compute.loss_chunk": 2048}
    monkeypatch.setattr(candidates, "REFINEMENTS", [(both, 0.9), (alone, 0.9)])
    found = [each.changes for each, _ in candidates.refinements(best, ComputeConfig(), "TPU v6 lite")]
    assert found == [alone, alone]


def queue_of(config, slice_):
    """The queue of a search, its result, and a function that adds what a candidate took."""
    result = search.SearchResult()
    queue = search.Queue(search.all_layouts(config, slice_, result), config.compute, slice_, result)

    def finish(candidate, seconds, size):
        plan = made_plan(seconds, size)
        result.trials.append(candidates.Trial(changes=candidate.changes, bound=candidate.bound, plan=plan))

    return queue, finish


def test_the_share_of_the_gate_that_fills_the_memory_follows_the_own_layout(monkeypatch):
    monkeypatch.setattr(candidates, "POLICIES", ("mlp",))
    monkeypatch.setattr(candidates, "SHARES", (0.0, 0.25, 0.5, 0.75))
    slice_ = topologies.find_slice("v5p-128")
    config = replace(RunConfig(model=preset("llama2_70b")), {"data.sequence_length": 4096})
    config = replace(config, {"train.batch_rows": 128, "compute.remat": "mlp"})
    for room, expected in ((28, 0.75), (20, 0.5), (11, 0.25)):  # GiB; the whole gate takes 35
        queue, finish = queue_of(config, slice_)
        own = queue.next()
        assert own.changes[candidates.GATE_SHARE] == 0
        finish(own, 10.0, slice_.generation.hbm - room * 2**30)
        following = queue.next()
        assert following.changes == {**own.changes, candidates.GATE_SHARE: expected}


def test_a_policy_that_keeps_the_gate_has_no_share(monkeypatch):
    monkeypatch.setattr(candidates, "POLICIES", ("mlp", "mlp_gate"))
    monkeypatch.setattr(candidates, "SHARES", (0.0, 0.5))
    config = seven_billion({"data.sequence_length": 4096, "train.batch_rows": 64, "compute.remat": "mlp"})
    for model, shares in (({}, {0.0, 0.5}), ({"num_experts": 8, "experts_per_token": 2}, {0.0})):
        made = replace(config, {f"model.{name}": value for name, value in model.items()})
        found = search.all_layouts(made, topologies.find_slice("v5p-128"), search.SearchResult())
        kept = [(each.changes["compute.remat"], each.changes[candidates.GATE_SHARE]) for each in found]
        assert {share for remat, share in kept if remat == "mlp"} == shares
        assert {share for remat, share in kept if remat == "mlp_gate"} == {0.0}


def test_what_helped_is_tried_with_other_layouts(monkeypatch):
    """A layout is expected to gain from a refinement what the best one gained."""
    monkeypatch.setattr(candidates, "POLICIES", ("full", "attention"))
    monkeypatch.setattr(candidates, "REFINEMENTS", [({"compute.loss_chunk": 0}, 0.9)])
    config = seven_billion({"data.sequence_length": 4096, "train.batch_rows": 32, "compute.remat": "full"})
    slice_ = topologies.find_slice("v5p-64")
    queue, finish = queue_of(config, slice_)
    own = queue.next()
    finish(own, 10.0, 2 * own.bound.bytes)
    refined = queue.next()
    assert refined.changes == {**own.changes, "compute.loss_chunk": 0}
    finish(refined, 8.0, 2 * own.bound.bytes)
    other = queue.next()
    assert other.changes["compute.remat"] == "attention"
    assert other.changes["compute.loss_chunk"] == 0
    scale = other.bound.likely_seconds / own.bound.likely_seconds
    assert candidates.likely_seconds(other, queue.result.trials) == pytest.approx(8.0 * scale)
    plain = candidates.Candidate(changes=other.layout, bound=other.bound)
    assert candidates.likely_seconds(plain, queue.result.trials) == pytest.approx(10.0 * scale)


def test_a_layout_that_is_slower_than_its_bound_promises_comes_later(monkeypatch):
    monkeypatch.setattr(candidates, "POLICIES", ("full", "attention", "mlp"))
    config = seven_billion({"data.sequence_length": 4096, "train.batch_rows": 32, "compute.remat": "full"})
    queue, finish = queue_of(config, topologies.find_slice("v5p-64"))
    own, fast = queue.next(), queue.next()
    assert fast.changes["compute.remat"] == "mlp"
    finish(own, 1.1 * own.bound.likely_seconds, own.bound.bytes)
    finish(fast, 3 * fast.bound.likely_seconds, fast.bound.bytes)
    assert queue.next().changes["compute.remat"] == "attention"


def made_candidate(seconds, gigabytes, host=0.0, **changes):
    """A candidate with these bounds, of a layout that differs by `changes`."""
    layout = candidates.layout_changes((1, 32, 1, 1, 1), ComputeConfig(), 1) | {
        name.replace("__", "."): value for name, value in changes.items()
    }
    buffers = ((int(gigabytes * 1e9), "all"),)
    bound = analytic.Bound(buffers=buffers, compute=seconds, memory=0.0, network=0.0, exchange=0.0, host=host)
    return candidates.Candidate(changes=layout, bound=bound)


@pytest.mark.parametrize(
    ("others", "order"),
    [
        ([(10.0, 80, 0.0), (10.0, 20, 0.0)], [1, 0]),  # of equal times the smaller program
        # A split gate that saves little comes after the whole one.
        ([(9.95, 10, 0.25), (10.0, 10, 0.0), (9.8, 10, 0.25)], [2, 1, 0]),
    ],
)
def test_the_order_of_bounds(others, order):
    own, *rest = (
        made_candidate(seconds, size, mesh__data=2**number, compute__gate_share=share)
        for number, (seconds, size, share) in enumerate([(10.0, 10, 0.0), *others])
    )
    slice_ = topologies.find_slice("v5p-64")  # 95.7 GiB
    queue = search.Queue([own, *rest], ComputeConfig(), slice_, search.SearchResult())
    assert [queue.next() for _ in (own, *rest)] == [own, *(rest[number] for number in order)]


def test_a_program_that_waits_for_the_host_says_nothing_of_others():
    own = made_candidate(10.0, 10, host=5.0, compute__remat="offload_mlp")
    trial = candidates.Trial(changes=own.changes, bound=own.bound, plan=made_plan(20.0))
    offloading = made_candidate(9.0, 10, host=5.0, compute__remat="offload_full")
    other = made_candidate(9.0, 10, compute__remat="full")
    assert candidates.likely_seconds(offloading, [trial]) == pytest.approx(18.0)
    assert candidates.likely_seconds(other, [trial]) == pytest.approx(1.2 * 9.0)
    assert candidates.likely_seconds(offloading, []) == pytest.approx(1.4 * 9.0)


def test_only_what_cannot_win_is_skipped():
    known = made_candidate(1.0, 1)
    compiled = candidates.Trial(changes=known.changes, bound=known.bound, plan=made_plan(10.0, size=20e9))
    for seconds, gigabytes, skipped in ((10.0, 20, True), (9.9, 20, False), (10.0, 19, False)):
        candidate = made_candidate(seconds, gigabytes)
        assert bool(candidates.reason_to_skip(candidate, [compiled])) == skipped
    known = made_candidate(1.0, 10, train__microbatches=4)
    refused = candidates.Trial(changes=known.changes, bound=known.bound, plan=made_plan(None))
    for gigabytes, remat, skipped in ((10, "full", True), (9, "full", False), (10, "mlp", False)):
        candidate = made_candidate(1.0, gigabytes, compute__remat=remat)
        assert bool(candidates.reason_to_skip(candidate, [refused])) == skipped


def test_the_configs_own_layout_comes_first(monkeypatch):
    monkeypatch.setattr(candidates, "POLICIES", ("full", "mlp", "offload_mlp"))
    options = {"data.sequence_length": 4096, "train.batch_rows": 96, "train.microbatches": 3}
    config = seven_billion(options | {"compute.remat": "offload_mlp"})
    kept = search.all_layouts(config, topologies.find_slice("v5e-32"), search.SearchResult())
    mesh = {"mesh.data": 1, "mesh.fsdp": 32, "mesh.sequence": 1, "mesh.tensor": 1}
    own = {**mesh, "compute.remat": "offload_mlp", "train.microbatches": 3, candidates.GATE_SHARE: 0.0}
    assert kept[0].changes == own
    times = [each.bound.likely_seconds for each in kept[1:]]
    assert times == sorted(times)
    assert sum(each.changes == kept[0].changes for each in kept) == 1


def test_bounds_are_corrected_by_what_was_compiled(monkeypatch):
    """A policy whose programs need twice their bound is tried with half of the memory first."""
    monkeypatch.setattr(candidates, "POLICIES", ("full", "mlp"))
    config = seven_billion({"data.sequence_length": 4096, "train.batch_rows": 64, "compute.remat": "mlp"})
    slice_ = topologies.find_slice("v5e-32")
    queue, finish = queue_of(config, slice_)
    first = queue.next()
    assert first.changes["compute.remat"] == "mlp"
    finish(first, None, 2 * first.bound.bytes)
    following = queue.next()
    assert 2 * following.bound.bytes <= slice_.generation.hbm < 2 * first.bound.bytes


def test_what_cannot_fit_is_not_compiled():
    config = seven_billion({"data.sequence_length": 4096, "train.batch_rows": 16})
    result = search.SearchResult()
    # 12 bytes a parameter in float32 with AdamW and 4 of gradients: 108 GB over 4 chips of 16.
    assert search.all_layouts(config, topologies.find_slice("v5e-4"), result) == []
    assert result.pruned["cannot fit by its shapes"] > 0


@pytest.mark.parametrize(
    ("length", "given", "tried"), [(128, 1, {1}), (4096, 1, {1, 2}), (16_384, 16, {1, 2, 4, 8, 16})]
)
def test_long_rows_are_cut_into_pieces(length, given, tried):
    config = seven_billion(
        {"data.sequence_length": length, "train.batch_rows": 16, "mesh.sequence": given},
        max_position_embeddings=length,
    )
    made = candidates.layouts(config.mesh, 16, length, topologies.find_slice("v5e-16"))
    assert {changes["mesh.sequence"] for changes in made} == tried
    # Slices exchange gradients alone.
    made = candidates.layouts(config.mesh, 16, length, topologies.find_slice("v5e-16", 2))
    assert {changes["mesh.data"] % 2 for changes in made} == {0}
