"""The training loop of every stage: mesh, data, model, state, then step after step."""

import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.cluster.coordination import barrier, from_primary
from lemur_jax.cluster.hosts import agree, inform, is_primary
from lemur_jax.cluster.lock import WAIT_SECONDS, workdir_lock
from lemur_jax.cluster.preemption import Interruption
from lemur_jax.common.json_files import digest_of
from lemur_jax.common.progress import Progress
from lemur_jax.config import RunConfig
from lemur_jax.models.decoder import num_params
from lemur_jax.telemetry.config import LogConfig
from lemur_jax.telemetry.profiler import check_steps, trace_steps
from lemur_jax.telemetry.provenance import code_digest, versions
from lemur_jax.telemetry.trackers import check_trackers
from lemur_jax.train import step
from lemur_jax.train.evaluate import Evaluations, EvaluationSteps
from lemur_jax.train.history import open_history
from lemur_jax.train.initial import InitialParams
from lemur_jax.train.inputs import Inputs, open_data
from lemur_jax.train.saves import Saves, due
from lemur_jax.train.state import TrainState
from lemur_jax.train.steplog import StepLog
from lemur_jax.train.unused import unused_options
from lemur_jax.train.workdir import check_changes, claim, config_changes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What the steps of a run use."""

    config: RunConfig
    inputs: Inputs
    saves: Saves
    evaluations: Evaluations
    log: StepLog
    stop: Interruption


def train(
    config: RunConfig,
    workdir: epath.PathLike,
    *,
    build: Callable[..., step.Program] = step.build,
    profile: range = range(0),
    extend: bool = False,
    open_inputs: Callable[..., Inputs] = open_data,
) -> bool:
    """Trains until `config.train.steps`; killed at any moment and called again, it reaches the same parameters.

    Args:
      config: the run config.
      workdir: gets `config.json`, `metrics.jsonl` and `checkpoints/`.
      build: makes the program; several runs of one process may share one (`sweep/runner.py`).
      profile: steps that every host traces to `WORKDIR/profile`.
      extend: accept a config that differs from the run's in what may change from its newest step on.
      open_inputs: (config, build) -> Inputs; default the mixture of `config.data`.

    Returns: whether a request to stop came: no other work should start.

    Raises:
      UserError: config, data, workdir and `profile` do not fit together, or the loss is not finite.
    """
    began, started = time.perf_counter(), time.time()
    check_steps(profile, config.train.steps)
    workdir, values, steps = epath.Path(workdir), config.to_json(), config.train.steps
    inputs = open_inputs(config, build)
    check_before_start(inputs, config.log)
    warn_of_unused_options(values)
    config_changes(values, workdir, extend=extend)  # refuses before anything is made
    with contextlib.ExitStack() as stack:
        if is_primary():
            stack.enter_context(workdir_lock(workdir))
        check_same_workdir(workdir)
        changes = config_changes(values, workdir, extend=extend)  # again: another run may have held the lock
        saves = stack.enter_context(open_saves(config, workdir, inputs))
        state, first = saves.first_state()
        check_changes(changes, values, first)
        history = stack.enter_context(open_history(config.log, workdir, first, started))
        history.write_changes(first, changes)
        if is_primary():  # only now: until here, wrong first parameters can be corrected in the config
            claim(values, workdir)
        stop = stack.enter_context(Interruption(config.checkpoint.grace_s))
        schedule = EvaluationSteps(config.eval, config.checkpoint, config.init, last=steps)
        rows = config.train.microbatch_rows
        evaluations = Evaluations(inputs.program, rows, schedule, inputs.held_out, history, stop.should_stop)
        unscored = evaluations.unscored(first)
        if first == steps and not unscored:
            inform(f"{workdir}: already finished at step {first}")
            return False
        inform(describe(inputs, steps, first, profile))
        bar = Progress(steps, f"train {workdir.name}", "steps", initial=first, enabled=is_primary())
        log = StepLog(history, stack.enter_context(bar), inputs.mixture, inputs.program, began, saves.tokens)
        log.write_start(first)
        if unscored:
            score_before_the_first_step(evaluations, log, inputs.program.weights(state), first, unscored)
        run = Run(config=config, inputs=inputs, saves=saves, evaluations=evaluations, log=log, stop=stop)
        with jax.transfer_guard("disallow"):  # transfers between host and device must be explicit
            return run_steps(run, state, first, profile, workdir / "profile")


def check_before_start(inputs: Inputs, log: LogConfig) -> None:
    """UserError: a kernel refuses the batch, a package of `config.log` is missing, or hosts differ in code or data."""
    if is_primary():  # only it writes to the trackers
        check_trackers(log)
    inputs.program.trace()
    code = "the code of lemur_jax, or the version of Python or a library (`lemur doctor` shows them),"
    agree(code, lambda: digest_of([code_digest(), *versions()]))
    held_out = {f"{each.task}, held out": each.rows.store.manifest.digest for each in inputs.held_out}
    agree("the data in config.data.stores", lambda: digest_of({**inputs.mixture.digests(), **held_out}))


def warn_of_unused_options(values: Mapping[str, Any]) -> None:
    """Logs which options of a config, as JSON, have no effect."""
    if is_primary() and (unused := unused_options(values)):
        logger.warning("options of the config without effect: %s", ", ".join(unused))


def check_same_workdir(workdir: epath.Path) -> None:
    """UserError: hosts do not share the workdir; each would save its part of every checkpoint on its own disk.

    The other hosts wait here for the primary, which first checks for another run.
    """
    if jax.process_count() == 1:
        return
    probe = workdir / f".shared-{uuid.uuid4().hex}"
    if is_primary():
        probe.write_text("")
    try:
        barrier("workdir", 2 * WAIT_SECONDS)  # longer than a collective waits for the primary
        is_visible = (workdir / from_primary(probe.name)).exists()
        agree("the workdir (all hosts must see the same files)", lambda: str(is_visible))
    finally:
        if is_primary():
            probe.unlink()


def run_steps(run: Run, state: TrainState, first: int, profile: range, profile_path: epath.Path) -> bool:
    """Updates `first` to the last one, with saves and evaluations between them; whether it was told to stop."""
    config, saves, evaluations, log, stop = run.config, run.saves, run.evaluations, run.log, run.stop
    program, done = run.inputs.program, first
    loader, rollouts = run.inputs.loader, run.inputs.rollouts
    batches = () if stop.requested else log.waiting(loader.iterate(first, config.train.steps))
    for index, batch in trace_steps(batches, profile, profile_path, finish=log.flush):
        state, metrics = rollouts.update(index, state) if rollouts else program.step(state, batch)
        done = index + 1
        log.add(done, metrics)
        limit = config.spikes.rollback_after  # the host waits for the step here only if it is set
        rolled_back = limit > 0 and int(jax.device_get(metrics["skips_in_a_row"])) >= limit
        if rolled_back:
            log.flush()
            with log.paused("checkpoint"):
                state, target = saves.roll_back(state, loader, config.spikes.max_rollbacks)
            log.write_rollback(done, target)
        # All hosts agree on a request to stop. It is read once, as a signal may come at any time ...
        stopping = stop.should_stop()
        if due(done, config.log.every_steps):
            saves.poll()  # ... and on whether a save is late or has failed
        save = saves.due(done, force=rolled_back or stopping)
        losses: dict[str, float] = {}
        if evaluations.due(done, save) and not stopping:
            log.flush()
            with log.paused("eval"):
                losses = evaluations.score(program.weights(state), done)
            stopping = stop.requested  # a request may have come meanwhile
            save = save or stopping
        if save:
            log.flush()  # parameters that are not finite are never saved
            with log.paused("checkpoint"):
                log.write_time(done, saves.finished())
                log.sync()
                saves.save(done, state, losses, log.tokens, stopping)
        elif due(done, config.log.every_steps):
            log.flush(keep=1)  # the newest step may still be running
        if stopping:
            break
    if stop.requested:
        saved = f"step {done} is saved" if done > first else f"no step was made after step {first}"
        inform(f"{stop.cause}: {saved}; the same command continues from there")
    return stop.requested


def open_saves(config: RunConfig, workdir: epath.Path, inputs: Inputs) -> Saves:
    """The checkpoints of a run; each holds the config, the tokenizer and the digests of the data."""
    metadata = make_metadata(
        model=config.model.to_dict(),
        tokenizer_files=inputs.tokenizer.files(),
        config=config.to_json(),
        data=inputs.mixture.digests(),
    )
    initial = InitialParams(
        init=config.init,
        adapter=config.adapter,
        seed=config.seed,
        tokenizer=inputs.tokenizer,
        program=inputs.program,
        teacher=config.distill.teacher,
    )
    return Saves(
        config.checkpoint,
        workdir,
        metadata,
        initial,
        last=config.train.steps,
        held_out={each.task: f"{each.task}, {each.num_bytes} bytes" for each in inputs.held_out},
        rollouts=inputs.rollouts,
    )


def score_before_the_first_step(
    evaluations: Evaluations, log: StepLog, params: Any, first: int, tasks: Sequence[str]
) -> None:
    """Held-out loss of the state from which this process starts."""
    with log.paused("eval"):
        evaluations.score(params, first, tasks)
    log.sync()
    barrier("evaluation", WAIT_SECONDS)  # each host may look for the records


def describe(inputs: Inputs, steps: int, first: int, profile: range) -> str:
    """Lines for the log: the data, the model, the mesh and the batch."""
    mesh, mixture = inputs.program.mesh, inputs.mixture
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    parameters = num_params(inputs.program.model) / 1e6
    lines = [inputs.plan] if inputs.plan else []
    lines.append(
        f"{f'resuming at step {first}' if first else 'starting'}: {parameters:,.1f}M parameters,"
        f" {mesh.size} {mesh.devices.flat[0].platform} devices ({axes}),"
        f" {mixture.batch_rows * mixture.length:,} tokens an update, {steps:,} updates"
    )
    if profile and profile.start < first:
        lines.append(f"no trace: step {profile.start} of --profile was made before this start")
    return "\n".join(lines)
