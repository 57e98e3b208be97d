"""`lemur sweep`: the runs, the merges, and what they add up to."""

import json
import logging
from collections.abc import Sequence

from etils import epath

from lemur_jax.config import load
from lemur_jax.sweep import merging, pareto, results, runner, runs

logger = logging.getLogger(__name__)


def sweep(
    argument: str,
    overrides: Sequence[str],
    workdir: epath.PathLike,
    *,
    ratios: Sequence[str] = (),
    sources: str = "",
    seeds: int = 3,
    varied: Sequence[str] = (),
    merges: Sequence[str] = (),
    command: str = "lemur sweep",
) -> results.Results | None:
    """Trains and scores what is missing, then writes `results.json`, `table.md`, `pareto.svg` and `index.html`.

    Args:
      argument, overrides: the base config, as `config.load` takes them.
      workdir: of the sweep.
      ratios, sources, seeds, varied: as `runs.plan_runs` takes them.
      merges: as `merging.plan_merges` takes them.
      command: that is shown on the results.

    Returns:
      The results; None after a SIGTERM.

    Raises:
      UserError: before the first step, if any of the runs cannot be trained.
    """
    config = load(argument, overrides)
    planned = runs.plan_runs(config, ratios, seeds, varied, sources)
    to_merge = merging.plan_merges(merges, planned)
    build = runner.building_once()
    if not runner.train_all(argument, overrides, planned, workdir, build):
        logger.info("stopped; the same command continues from there")
        return None
    merging.evaluate_all(argument, overrides, to_merge, workdir, build)
    found = results.read_results(config, planned, to_merge, workdir)
    written = {"results.json": json.dumps(results.to_json(found), indent=1) + "\n"}
    for name, text in (written | pareto.result_files(found, command)).items():
        (epath.Path(workdir) / name).write_text(text)
    return found
