"""`lemur sweep`: trains the runs one after another in one process, merges them, and writes the results."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
from etils import epath
from jax.sharding import Mesh

from lemur_jax.common.errors import Diverged, UserError
from lemur_jax.config import RunConfig
from lemur_jax.sweep import merging, pareto, results
from lemur_jax.sweep.runs import SweepRun
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train import step
from lemur_jax.train.inputs import open_run_mixture
from lemur_jax.train.loop import train
from lemur_jax.train.workdir import config_changes

logger = logging.getLogger(__name__)

# Sections of a config that no program depends on.
_NOT_COMPILED = ("seed", "init", "tokenizer", "prepare", "eval", "checkpoint", "log", "hosts")


def sweep(
    runs: Mapping[SweepRun, RunConfig], merges: Sequence[merging.Merge], workdir: epath.PathLike, command: str
) -> results.Results | None:
    """Trains and scores what is missing, then writes `results.json` and what `pareto.result_files` makes.

    Each run of `plan_runs`, with its config, gets its own workdir below `workdir`; `command` is shown on the results.
    Returns None after a SIGTERM. Raises UserError before the first step if any of the runs cannot be trained, and after
    the last one if one has diverged.
    """
    if jax.process_count() > 1:
        raise UserError("a sweep is for one process: print its runs with --print and launch each")
    for run, config in runs.items():  # refuses what the run would refuse at its start
        if not config.init.checkpoint:
            raise UserError("a sweep compares runs from one base: name it with --config.init.checkpoint")
        if not config.eval.tasks:
            raise UserError("a sweep compares held-out figures: name tasks in config.eval.tasks")
        if merges and config.adapter.rank:
            raise UserError(
                f"{run.variant}: --merge is of whole models, and config.adapter.rank is {config.adapter.rank}: leave"
                " --merge out, or set it to 0"
            )
        if config.data.stages and any(merge.kind == "arithmetic" for merge in merges):
            raise UserError(
                "--merge arithmetic adds up runs of one part of the data each, and config.data.stages mixes others in:"
                " leave one of them out"
            )
        try:
            tokenizer = Tokenizer.from_config(config.tokenizer)
            open_run_mixture(config.data, config.train, tokenizer, config.seed)
        except UserError as error:
            raise UserError(f"{run.variant}: {error}") from error
    for run, config in runs.items():
        config_changes(config.to_json(), run.directory(workdir))  # refuses a run of another config
    build, failed = building_once(), []
    for number, (run, config) in enumerate(runs.items(), start=1):
        directory = run.directory(workdir)
        logger.info("run %d of %d: %s, seed %d", number, len(runs), run.variant, run.seed)
        try:
            if train(config, directory, build=build):
                logger.info("stopped; the same command continues from there")
                return None
        except Diverged as error:  # the others are trained
            failed.append(f"{run.variant}, seed {run.seed}: {error}")
            logger.error("%s", failed[-1])
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs diverged, and results need all: call it again without their ratios or"
            f" values. The first: {failed[0]}"
        )
    merging.evaluate_all(merges, runs, workdir, build)
    figures = results.read_results(runs, merges, workdir)
    files = {"results.json": json.dumps(results.to_json(figures), indent=1) + "\n"}
    for name, text in (files | pareto.result_files(figures, command)).items():
        (epath.Path(workdir) / name).write_text(text)
    return figures


def building_once() -> Callable[..., step.Program]:
    """`train.step.build` with a cache: configs that differ in nothing compiled share a program.

    Its jitted functions keep what they have compiled, so only the first of these runs waits for XLA.
    """
    programs: dict[str, step.Program] = {}

    def build(config: RunConfig, mesh: Mesh, num_sources: int) -> step.Program:
        content = {key: value for key, value in config.to_json().items() if key not in _NOT_COMPILED}
        content["data"] = config.data.sequence_length, num_sources
        content["dropout seed"] = config.seed if config.adapter.dropout else None
        content["devices"] = [str(device) for device in mesh.devices.flat]
        key = json.dumps(content, sort_keys=True)
        if key not in programs:
            programs[key] = step.build(config, mesh, num_sources)
        return programs[key]

    return build
