"""The search on a model small enough to compile in seconds, with the real TPU compiler."""

import contextlib
import dataclasses
import json
import logging

import jax
import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.config import load, replace
from lemur_jax.models.config import ComputeConfig
from lemur_jax.plan import analytic, candidates, pareto, search
from lemur_jax.plan.plan import plan


@pytest.fixture(scope="module")
def base(tmp_path_factory, write_config):
    return write_config(
        tmp_path_factory.mktemp("config"),
        "config = default_config(preset('tiny', num_hidden_layers=int(arg or 2)))",
        "config.data.sequence_length, config.train.batch_rows, config.train.steps = 128, 8, 10",
    )


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
    config = load(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "all_layouts", two)
        patch.setattr(candidates, "REFINEMENTS", ())
        found = search.search(config, "v5e-4", minutes=10, processes=2, cache=cache)
    return config, cache, found


def two(config, tpu, result):
    """Two candidates that fit, and one that the compiler is not asked about."""
    wanted = [
        candidates.layout_changes((1, 4, 1, 1, 1), ComputeConfig(remat=remat), microbatches=1)
        for remat in ("full", "none")
    ]
    bounds = [analytic.lower_bound(replace(config, each), tpu) for each in wanted]
    wanted.append({**wanted[0], "train.microbatches": 2})
    bounds.append(dataclasses.replace(bounds[0], compute=1e3, buffers=((10**10, "all"),)))
    return [
        candidates.Candidate(changes=each, bound=bound) for each, bound in zip(wanted, bounds, strict=True)
    ]


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
    refinements = [({"compute.loss_chunk": 0}, 0.9), ({"compute.attention_blocks": (100, 0)}, 0.9)]
    refinements.append(({candidates.OPTIONS: (option,)}, 0.9))
    monkeypatch.setattr(candidates, "REFINEMENTS", refinements)
    monkeypatch.setattr(search, "all_layouts", lambda *arguments: two(*arguments)[:1])
    config = replace(load(base), {"compute.loss_chunk": 32})
    caplog.set_level(logging.INFO, "lemur_jax")
    found = search.search(config, "v5e-4", minutes=10, processes=2, cache=tmp_path)
    tried = [trial.changes for trial in found.trials]
    plain, *refined = tried
    assert all({**plain, **values} in refined for values, _ in refinements[:2])
    assert {**plain, candidates.OPTIONS: (option,)} in refined
    assert found.best.changes["compute.loss_chunk"] == 0  # one product of the head instead of four
    assert {**plain, "compute.loss_chunk": 0, candidates.OPTIONS: (option,)} in refined
    assert any("refused" in line and "attention_blocks (100, 0)" in line for line in caplog.messages)
    pareto.write(found, tmp_path / "out", f"{base}:2", ["--config.compute.loss_chunk=32"], "title")
    assert load(str(tmp_path / "out" / "best.py")).compute.loss_chunk == 0


def test_a_second_run_reads_the_cache_and_leaves_out_what_the_config_does_not_allow(first, monkeypatch):
    """As a share of the gate with experts is not."""
    config, cache, found = first
    monkeypatch.setattr(search, "all_layouts", two)
    monkeypatch.setattr(candidates, "REFINEMENTS", [({"compute.loss_chunk": -1}, 0.9)])
    again = search.search(config, "v5e-4", minutes=10, processes=2, cache=cache)
    assert (again.compiled, again.cached) == (0, 2)
    assert again.best.plan == found.best.plan


def test_an_option_that_xla_does_not_know_ends_the_search(tpu_compiler, base, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "all_layouts", two)
    for option, compiled in (("xla_tpu_nonsense=true", 1), ("nonsense", 0)):
        config = replace(load(base), {"compute.compiler_options": (option,)})
        with (
            contextlib.nullcontext() if compiled else pytest.raises(UserError, match="cannot read 'nonsense'")
        ):
            found = search.search(config, "v5e-4", minutes=1e-9, processes=1, cache=tmp_path)
    assert (found.compiled, found.best) == (1, None)
    assert "xla_tpu_nonsense" in found.trials[0].error
    # A later search tries again: the option, or a package that was missing, may be known then.
    assert not list(tmp_path.glob("*.json"))


def test_what_xla_refuses_is_an_error_of_one_line(tmp_path):
    def refused():
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: not on this platform\nframe 1\nframe 2")

    search.write_plan(refused, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "error": "FAILED_PRECONDITION: not on this platform",
        "retry": False,
    }


def test_the_fragment_is_a_config_with_the_same_plan(first, base, tmp_path):
    found = first[2]
    (tmp_path / "other/disk").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "other/disk")
    odd = tmp_path / "base\udcff.py"  # a byte that is no UTF-8
    odd.symlink_to(base)
    pareto.write(found, tmp_path / "out", f"{odd}:2", ["--config.train.steps=20"], f"{odd} on v5e-4")
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
    # Where nothing fits, the config of an earlier search is not left for the next command.
    pareto.write(search.SearchResult(), tmp_path / "out", base, [], "title")
    assert not (tmp_path / "out" / "best.py").exists()
    assert not (tmp_path / "out" / "pareto.html").exists()


def test_the_verb(tpu_compiler, base, tmp_path, capsys):
    verb = ["plan", "--config", base, "--topology", "v5e-4"]
    out = tmp_path / "out"
    searching = [*verb, "--search", "--cache", str(tmp_path / "cache"), "--output", str(out)]
    # The time is over at once, but it does not end before something fits.
    assert main([*searching, "--minutes", "1e-9", "--processes", "1"]) == 0
    assert "the fastest: lemur train --config" in capsys.readouterr().out
    written = json.loads((out / "search.json").read_text())
    assert (written["compiled"], len(written["trials"])) == (1, 1)
    assert written["untried"] > 0
    unsized = load(base, ["--config.mesh.fsdp=1", "--config.mesh.expert=-1"])
    with pytest.raises(UserError, match=r"give config\.mesh\.expert a size"):
        search.search(unsized, "v5e-4", minutes=1, processes=1, cache=tmp_path)
    assert load(str(out / "best.py")).compute.remat == load(base).compute.remat
    for wrong, message in (
        ([*searching, "--json", "plan.json"], "leave out --mode, --json and --hlo"),
        ([*searching, "--minutes", "0"], "--minutes must be above 0"),
        ([*searching, "--minutes", "nan"], "--minutes must be above 0"),
        ([*searching, "--output", "gs://bucket/search"], "must be directories of this machine"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_the_key_follows_what_the_plan_depends_on(base, monkeypatch):
    def key(slice_: str, slices: int, *words: str) -> str:
        return search.cache_key(load(base, words).to_json(), slice_, slices)

    known = key("v5e-4", 1)
    assert key("v5e-4", 1, "--config.log.every_steps=3") == known
    assert key("v5e-4", 1, "--config.compute.remat=none") != known
    assert key("v5e-8", 1) != known
    assert key("v5e-4", 2) != known
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    assert key("v5e-4", 1) != known
