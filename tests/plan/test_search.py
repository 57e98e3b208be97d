"""The search on a model small enough to compile in seconds, with the real TPU compiler."""

import json
import logging
import types

import jax
import pytest
from jax.sharding import AbstractMesh

from lemur_jax.cli import main
from lemur_jax.config import RunConfig, load, replace
from lemur_jax.models.config import ComputeConfig
from lemur_jax.models.presets import preset
from lemur_jax.models.remat import POLICIES
from lemur_jax.parallel.mesh import AXES
from lemur_jax.plan import analytic, candidates, pareto, search, topologies
from lemur_jax.plan.plan import plan

BASE = """
from lemur_jax.config import default_config
from lemur_jax.models.presets import preset

def get_config(arg=""):
    config = default_config(preset("tiny", num_hidden_layers=int(arg or 2)))
    config.data.sequence_length = 128
    config.train.batch_rows = 8
    config.train.steps = 10
    return config
"""


def tpu():
    return topologies.find_slice("v5e-4")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "base.py"
    path.write_text(BASE)
    return path


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few enough candidates to compile them all."""
    monkeypatch.setattr(candidates, "TENSOR_WAYS", (1,))
    monkeypatch.setattr(candidates, "POLICIES", ("full", "none"))
    monkeypatch.setattr(candidates, "SHARES", (0.0,))
    monkeypatch.setattr(candidates, "REFINEMENTS", ())


@pytest.fixture(scope="module")
def first(tpu_compiler, base, tmp_path_factory):
    """A search that ended by itself, and its cache."""
    cache = tmp_path_factory.mktemp("cache")
    config = load(str(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "all_layouts", two)
        patch.setattr(candidates, "REFINEMENTS", ())
        found = search.search(config, "v5e-4", minutes=10, processes=2, cache=cache)
    return config, cache, found


def seven_billion(options, **model):
    return replace(RunConfig(model=preset("llama2_7b", **model)), options)


def two(config, tpu, result):
    """Two candidates that fit, and one that the compiler is not asked about."""
    changes = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.sequence": 1, "mesh.tensor": 1, "train.microbatches": 1}
    wanted = [{**changes, "compute.remat": remat} for remat in ("full", "none")]
    bounds = [analytic.lower_bound(replace(config, each), tpu) for each in wanted]
    made = [
        candidates.Candidate(changes=each, bound=bound) for each, bound in zip(wanted, bounds, strict=True)
    ]
    slow = analytic.Bound(
        buffers=((10**10, "all"),), compute=1e3, memory=0.0, network=0.0, exchange=0.0, host=0.0
    )
    return [*made, candidates.Candidate(changes={**wanted[0], "train.microbatches": 2}, bound=slow)]


def test_finds_the_best_and_does_not_compile_the_hopeless(first):
    _, cache, found = first
    assert (found.compiled, found.cached, found.untried) == (2, 0, 0)
    assert found.pruned == {"cannot beat one that was compiled": 1}
    assert len(list(cache.glob("*.json"))) == 2
    assert found.best.plan.step_seconds == min(trial.plan.step_seconds for trial in found.trials)
    assert found.best in found.front()


@pytest.mark.slow
def test_the_best_is_refined_and_what_helps_stays(tpu_compiler, base, tmp_path, monkeypatch, caplog):
    option = "xla_tpu_scheduler_percent_shared_memory_limit=110"
    refinements = [("compute.loss_chunk", 0, 0.9), ("compute.attention_blocks", (100, 0), 0.9)]
    refinements.append((candidates.OPTIONS, (option,), 0.9))
    monkeypatch.setattr(candidates, "REFINEMENTS", refinements)
    monkeypatch.setattr(search, "all_layouts", lambda *arguments: two(*arguments)[:1])
    config = replace(load(str(base)), {"compute.loss_chunk": 32})
    caplog.set_level(logging.INFO, "lemur_jax")
    found = search.search(config, "v5e-4", minutes=10, processes=2, cache=tmp_path)
    tried = [trial.changes for trial in found.trials]
    plain, *refined = tried
    assert all({**plain, name: value} in refined for name, value, _ in refinements[:2])
    assert {**plain, candidates.OPTIONS: (option,)} in refined
    assert found.best.changes["compute.loss_chunk"] == 0  # one product of the head instead of four
    assert {**plain, "compute.loss_chunk": 0, candidates.OPTIONS: (option,)} in refined
    assert any("refused" in line and "attention_blocks (100, 0)" in line for line in caplog.messages)
    pareto.write(found, tmp_path / "out", f"{base}:2", ["--config.compute.loss_chunk=32"], "title")
    assert load(str(tmp_path / "out" / "best.py")).compute.loss_chunk == 0


def made_plan(seconds, size=1):
    """What the order of candidates reads of a plan."""
    return types.SimpleNamespace(
        fits=seconds is not None, step_seconds=seconds, hbm_bytes_per_chip=size, chips=1, mesh={"fsdp": 1}
    )


def test_a_value_that_the_config_has_is_not_tried(monkeypatch):
    option = "xla_tpu_scoped_vmem_limit_kib=98304"
    monkeypatch.setattr(candidates, "REFINEMENTS", [(candidates.OPTIONS, (option,), 0.9)])
    best = candidates.Trial(changes={}, bound=None, plan=made_plan(2.0))
    for kind, options, tried in (("TPU v4", (), [1.8]), ("TPU v6 lite", (), []), ("TPU v4", (option,), [])):
        found = candidates.refinements(best, ComputeConfig(compiler_options=options), kind)
        assert [seconds for _, seconds in found] == tried
    monkeypatch.setattr(candidates, "REFINEMENTS", [("compute.loss_chunk", 0, 0.9)])
    for chunk, tried in ((512, 1), (0, 0)):
        assert len(list(candidates.refinements(best, ComputeConfig(loss_chunk=chunk), "TPU v4"))) == tried


def test_what_the_config_does_not_allow_is_left_out(first, monkeypatch):
    """As a share of the gate with experts is not."""
    config, cache, _ = first
    monkeypatch.setattr(search, "all_layouts", two)
    monkeypatch.setattr(candidates, "REFINEMENTS", [("compute.loss_chunk", -1, 0.9)])
    again = search.search(config, "v5e-4", minutes=10, processes=2, cache=cache)
    assert (again.compiled, again.cached) == (0, 2)


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
    monkeypatch.setattr(candidates, "REFINEMENTS", [("compute.loss_chunk", 0, 0.9)])
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


def test_of_equal_times_the_smaller_program_comes_first():
    slice_ = topologies.find_slice("v5p-64")  # 95.7 GiB
    own, large, small = (
        made_candidate(10.0, gigabytes, mesh__data=data) for data, gigabytes in ((1, 10), (2, 80), (4, 20))
    )
    queue = search.Queue([own, large, small], ComputeConfig(), slice_, search.SearchResult())
    assert [queue.next() for _ in range(3)] == [own, small, large]


def test_a_program_that_waits_for_the_host_says_nothing_of_others():
    own = made_candidate(10.0, 10, host=5.0, compute__remat="offload_mlp")
    trial = candidates.Trial(changes=own.changes, bound=own.bound, plan=made_plan(20.0))
    offloading = made_candidate(9.0, 10, host=5.0, compute__remat="offload_full")
    other = made_candidate(9.0, 10, compute__remat="full")
    assert candidates.likely_seconds(offloading, [trial]) == pytest.approx(18.0)
    assert candidates.likely_seconds(other, [trial]) == pytest.approx(1.2 * 9.0)
    assert candidates.likely_seconds(offloading, []) == pytest.approx(1.4 * 9.0)


def test_what_xla_refuses_is_an_error_of_one_line(tmp_path):
    def refused():
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: not on this platform\nframe 1\nframe 2")

    search.write_plan(refused, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "error": "FAILED_PRECONDITION: not on this platform"
    }


def test_a_second_run_reads_the_cache(first):
    config, cache, found = first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "all_layouts", two)
        again = search.search(config, "v5e-4", minutes=10, processes=2, cache=cache)
    assert (again.compiled, again.cached) == (0, 2)
    assert again.best.plan == found.best.plan


def test_the_fragment_is_a_config_with_the_same_plan(first, base, tmp_path):
    found = first[2]
    pareto.write(found, tmp_path / "out", f"{base}:2", ["--config.train.steps=20"], "title")
    loaded = load(str(tmp_path / "out" / "best.py"))
    assert loaded.train.steps == 20
    assert loaded.mesh.fsdp == 4
    again = plan(replace(loaded, {"train.steps": 10}), "v5e-4")
    assert again.step_seconds == pytest.approx(found.best.plan.step_seconds)
    assert again.hbm == found.best.plan.hbm
    # It is a config like any other: overrides come on top.
    assert load(str(tmp_path / "out" / "best.py"), ["--config.mesh.fsdp=2"]).mesh.fsdp == 2
    written = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(written["trials"]) == 2
    page = (tmp_path / "out" / "pareto.html").read_text()
    assert page.count("<circle") == 4  # two dots, on a screen and on a phone


def test_the_verb(tpu_compiler, base, tmp_path, capsys):
    verb = ["plan", "--config", str(base), "--topology", "v5e-4"]
    out = tmp_path / "out"
    searching = [*verb, "--search", "--cache", str(tmp_path / "cache"), "--output", str(out)]
    # The time is over at once, but it does not end before something fits.
    assert main([*searching, "--minutes", "1e-9", "--processes", "1"]) == 0
    assert "the fastest: lemur train --config" in capsys.readouterr().out
    written = json.loads((out / "search.json").read_text())
    assert (written["compiled"], len(written["trials"])) == (1, 1)
    assert written["untried"] > 0
    assert load(str(out / "best.py")).compute.remat == load(str(base)).compute.remat
    missing = str(tmp_path / "missing" / "plan")
    for wrong, message in (
        ([*searching, "--json", "plan.json"], "leave out --mode, --json and --hlo"),
        ([*searching, "--minutes", "0"], "--minutes must be above 0"),
        ([*verb, "--json", missing], "cannot be written: there is no directory"),
        ([*verb, "--hlo", missing], "cannot be written: there is no directory"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


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
    assert search.all_layouts(config, tpu(), result) == []
    assert result.pruned["cannot fit by its shapes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "share"), [*((policy, 0.0) for policy in POLICIES), ("mlp", 0.5)])
def test_no_policy_keeps_less_than_its_bound(tpu_compiler, narrow, policy, share):
    """The arrays that the compiled loop over the layers carries, of two layers on a v4-16."""
    options = {"compute.remat": policy, "compute.gate_share": share}
    config, mesh = narrow(options), AbstractMesh((1, 8, 1, 1, 1), AXES)
    assert config.data.sequence_length == 512
    bound = (
        sum(size for _, size in analytic.stored_bytes(config.model, config.compute, 512, mesh, "keep")) * 512
    )
    kept = plan(config, "v4-16").hbm["activations"]
    assert 0.7 * kept < bound < 1.01 * kept


def test_the_bound_of_keeping_everything_is_the_largest():
    options = {"data.sequence_length": 4096, "train.batch_rows": 32}
    config = replace(RunConfig(model=preset("llama2_70b")), options)
    size = {
        policy: analytic.lower_bound(
            replace(config, {"compute.remat": policy}), topologies.find_slice("v5p-32")
        ).bytes
        for policy in POLICIES
    }
    assert size["full"] < size["attention"] < size["mlp"] < size["dots"] <= size["mlp_all"] < size["none"]
    assert max(size, key=size.get) == "none"


def test_bounds_by_hand():
    options = {"train.batch_rows": 64, "train.microbatches": 2, "compute.remat": "attention"}
    config = seven_billion(options | {"data.sequence_length": 4096})
    bound = analytic.lower_bound(config, topologies.find_slice("v5e-16"))
    buffers = {what.partition(",")[0]: size for size, what in bound.buffers}
    assert buffers["parameters"] == pytest.approx(6_738_415_616 * 4 / 16, rel=1e-3)
    assert buffers["optimizer state"] == pytest.approx(2 * buffers["parameters"], rel=1e-3)
    rows = 64 / 2 / 16
    assert buffers["activations kept: attention_out"] == rows * 4096 * 4096 * 2 * 32
    assert buffers["activations kept: layer_in"] == rows * 4096 * 4096 * 2 * 32
    # 6 FLOPs a parameter and token, 2 more for the layers that are computed again, at 197 TFLOP/s.
    tokens = 64 * 4096
    assert bound.compute > 6 * 6.6e9 * tokens / (16 * 197e12)
    assert bound.compute < 8.5 * 6.74e9 * tokens / (16 * 197e12) * 1.2


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


def test_positions_traded_for_heads_cost_time():
    options = {"data.sequence_length": 16_384, "train.batch_rows": 16, "mesh.fsdp": 1, "mesh.sequence": 16}
    config = seven_billion(options, max_position_embeddings=16_384)
    # Query, key, value and output: 15 of 16 parts of 4 x 4096 numbers a position go to others, in 32 layers, both ways.
    moved = 2 * 32 * 16_384 * 4 * 4096 * 2 * 15 / 16
    bound = analytic.lower_bound(config, topologies.find_slice("v5e-16"))
    assert bound.network == pytest.approx(moved / (2 * 45e9), rel=0.01)
    assert bound.exchange == pytest.approx(moved / 45e9, rel=0.01)
    config = replace(config, {"model.num_attention_heads": 20, "model.num_key_value_heads": 20})
    result = search.SearchResult()
    kept = search.all_layouts(config, topologies.find_slice("v5e-16"), result)
    assert all(each.changes["mesh.sequence"] < 8 for each in kept)
    assert result.pruned["the model, the batch or the config does not allow it"]


def test_what_layers_keep_is_cut_over_tensor():
    options = {"data.sequence_length": 4096, "train.batch_rows": 16, "compute.remat": "mlp_all"}
    config = seven_billion(options | {"mesh.tensor": 4})
    by_name = {what.partition(",")[0]: size for size, what in analytic.lower_bound(config, tpu()).buffers}
    config = replace(config, {"mesh.tensor": 1})
    whole = {what.partition(",")[0]: size for size, what in analytic.lower_bound(config, tpu()).buffers}
    # A row lies on 4 chips instead of one, so each has four times the tokens and a fourth of every array.
    kept = [name for name in whole if name.startswith("activations kept")]
    assert len(kept) == 7
    assert all(by_name[name] == whole[name] for name in kept)


def test_host_memory_costs_time():
    options = {"data.sequence_length": 4096, "train.batch_rows": 16, "compute.remat": "offload_full"}
    config = seven_billion(options)
    bound = analytic.lower_bound(config, topologies.find_slice("v5e-16"))
    assert bound.host == pytest.approx(2 * 4096 * 4096 * 2 * 32 / 12e9)  # there and back
    assert not any("activations" in what for _, what in bound.buffers)


def test_the_key_follows_what_the_plan_depends_on(base):
    def key(slice_: str, slices: int, *words: str) -> str:
        return search.cache_key(load(str(base), words).to_json(), slice_, slices)

    known = key("v5e-4", 1)
    assert key("v5e-4", 1, "--config.log.every_steps=3") == known
    assert key("v5e-4", 1, "--config.compute.remat=none") != known
    assert key("v5e-8", 1) != known
    assert key("v5e-4", 2) != known
