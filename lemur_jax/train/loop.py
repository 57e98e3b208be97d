"""The training loop of every stage: mesh, data, model, state, then step after step."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from lemur_jax.checkpoint.manager import Checkpoints, make_metadata
from lemur_jax.common.config import to_json
from lemur_jax.common.errors import UserError
from lemur_jax.data.budget import budget, check_budget, format_budget
from lemur_jax.data.loader import Loader
from lemur_jax.data.mixture import open_mixture
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.models.llama import num_params
from lemur_jax.parallel.hosts import any_host
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import batch_sharding
from lemur_jax.telemetry.metrics import MetricsWriter, Record, read_metrics
from lemur_jax.telemetry.profiler import check_steps, traced
from lemur_jax.telemetry.progress import Progress
from lemur_jax.train import state as states
from lemur_jax.train.evaluate import Evaluations, open_held_out
from lemur_jax.train.initial import initial_params
from lemur_jax.train.interruption import Interruption
from lemur_jax.train.spikes import memory, rollback_target, rolled_back
from lemur_jax.train.state import TrainState
from lemur_jax.train.step import Program, build
from lemur_jax.train.steplog import StepLog
from lemur_jax.train.workdir import claim

# Between two attempts to save the last step.
_RETRY_SECONDS = 10.0


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    say: Callable[[str], None] = print,
    build: Callable[..., Program] = build,
    profile: range = range(0),
) -> None:
    """Trains until `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Killed at any moment and called again, it reaches the parameters that it would have reached: the
    batch of a step depends on the step alone, and a checkpoint holds all the rest.

    Args:
      config: a run config.
      workdir: gets `config.json`, `metrics.jsonl` and `checkpoints/`.
      say: gets what a person wants to read.
      build: makes the program; several runs of one process may share one (`sweep/runner.py`).
      profile: steps of which every host writes a trace to `WORKDIR/profile`.

    Raises:
      UserError: the config, the data, the workdir and `profile` do not fit together, or the loss is not finite.
    """
    began = time.perf_counter()
    check_steps(profile, config.train.steps)
    mesh = make_mesh(config.mesh)
    chief = jax.process_index() == 0

    tokenizer = Tokenizer.load(config.tokenizer.path)
    mixture = open_mixture(config, tokenizer)
    held_out = open_held_out(config, tokenizer)
    needs = budget(mixture, config.train.steps)
    check_budget(needs)

    program = build(config, mesh, num_sources=len(mixture.sources))
    _check_vocabulary(config, tokenizer)

    workdir = claim(config, workdir, write=chief)
    metadata = make_metadata(
        model=program.model.to_dict(),
        tokenizer_files=tokenizer.files(),
        config=to_json(config),
        data=mixture.digests(),
    )
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(_checkpoints(config, workdir, say))
        state, first = _first_state(config, program, checkpoints, metadata)

        writer = stack.enter_context(_writer(config, workdir)) if chief else None
        if writer:
            # From step 0 on, what was scored there is scored again.
            writer.truncate_after(first or -1)
        if first == config.train.steps:
            say(f"{workdir}: already finished at step {first}")
            return
        if profile and profile.start < first:
            say(f"no trace: step {profile.start} of --profile was made before this start")
        if chief:
            say(format_budget(needs))
            say(_headline(program, config, first))

        progress = stack.enter_context(
            Progress(config.train.steps, f"train {workdir.name}", "steps", initial=first, enabled=chief)
        )
        records = read_metrics(workdir) if chief else []
        log = StepLog(writer, progress, mixture, _tokens_until(records), program=program, began=began)
        evaluations = Evaluations(program, config, held_out, writer, progress.write, records)
        interruption = stack.enter_context(Interruption(config.checkpoint.grace_s))
        if first == 0 and config.init.checkpoint:
            with log.paused("eval"):
                evaluations.score(state.params, 0)
        saved_at = time.monotonic()
        loader = Loader(mixture, batch_sharding(mesh))
        batches = log.waiting(loader.iterate(first, config.train.steps))
        for step, batch in traced(batches, profile, workdir / "profile", finish=log.flush):
            state, metrics = program.step(state, batch)
            done = step + 1
            log.add(done, metrics)
            undoing = _too_many_skips(config, metrics)
            if undoing:
                log.flush()
                with log.paused("checkpoint"):
                    state, target = _roll_back(config, program, checkpoints, metadata, loader, state)
                log.rolled_back(done, target)
            stopping = interruption.reached(done)
            last = done == config.train.steps
            evaluating = held_out and (last or _due(done, config.eval.every_steps)) and not stopping
            saving = last or stopping or undoing or _due(done, config.checkpoint.every_steps)
            if _due(done, config.log.every_steps):
                saving |= _overdue(config, checkpoints, saved_at)
            if evaluating or saving:
                log.flush()  # parameters that are not finite are never saved
                losses: dict[str, float] = {}
                if evaluating:
                    with log.paused("eval"):
                        losses = evaluations.score(state.params, done)
                if saving:
                    with log.paused("checkpoint"):
                        log.write_time(done)
                        if writer:
                            writer.sync()
                        best = losses.get(config.checkpoint.keep_best)
                        checkpoints.save(done, state.params, state.optimizer, metadata, best)
                        saved_at = time.monotonic()
                        if last or stopping:
                            _finish(checkpoints, done, state, metadata, best)
            elif _due(done, config.log.every_steps):
                log.flush(keep=1)  # the newest step may still be running
            if stopping:
                say(f"SIGTERM: step {done} is saved; the same command goes on from there")
                return


def _checkpoints(config: ConfigDict, workdir: epath.Path, say: Callable[[str], None]) -> Checkpoints:
    options = config.checkpoint
    if options.other_optimizer not in ("refuse", "fresh"):
        raise UserError(
            f"config.checkpoint.other_optimizer is {options.other_optimizer!r}: it must be 'refuse' or 'fresh'"
        )
    if options.keep_best and options.keep_best not in config.eval.tasks:
        raise UserError(
            f"config.checkpoint.keep_best {options.keep_best!r} is not among config.eval.tasks"
            f" {tuple(config.eval.tasks)}"
        )
    return Checkpoints(
        workdir / "checkpoints",
        keep=options.keep,
        keep_every=options.keep_every,
        keep_best=1 if options.keep_best else 0,
        max_failures=options.max_failures,
        broadcast=options.broadcast,
        say=say,
    )


def _overdue(config: ConfigDict, checkpoints: Checkpoints, saved_at: float) -> bool:
    """Whether to save out of turn: the last save failed, or is too long ago; the same on all hosts."""
    checkpoints.poll()
    minutes = config.checkpoint.every_minutes
    late = minutes > 0 and time.monotonic() - saved_at >= 60 * minutes
    return any_host(late or checkpoints.failed)


def _finish(
    checkpoints: Checkpoints, step: int, state: TrainState, metadata: dict[str, Any], loss: float | None
) -> None:
    """Waits for the save of the last step and repeats it while it fails; too many failures raise."""
    checkpoints.wait()
    while checkpoints.failed:
        time.sleep(_RETRY_SECONDS)
        checkpoints.save(step, state.params, state.optimizer, metadata, loss)
        checkpoints.wait()


def _writer(config: ConfigDict, workdir: epath.Path) -> MetricsWriter:
    return MetricsWriter(workdir, tensorboard=config.log.tensorboard)


def _check_vocabulary(config: ConfigDict, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer {config.tokenizer.path} has {tokenizer.vocab_size} tokens, config.model.vocab_size is"
            f" {config.model.vocab_size}: it must be at least as large"
        )


def _first_state(
    config: ConfigDict,
    program: Program,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    at_most: int | None = None,
) -> tuple[TrainState, int]:
    """The state of the newest checkpoint that is whole and its step, or a fresh state and 0.

    Args:
      at_most: later checkpoints are left alone; None: there are none such.
    """

    def check(stored: Mapping[str, Any]) -> None:
        if stored["data"] != metadata["data"]:
            changed = sorted(k for k in metadata["data"] if stored["data"].get(k) != metadata["data"][k])
            raise UserError(
                f"{checkpoints.path} was trained on other data: the store of {', '.join(changed) or 'a task'}"
                " has changed since; put the old stores back, or start in a new --workdir"
            )

    fresh = config.checkpoint.other_optimizer == "fresh"
    abstract = program.state
    found = checkpoints.restore_newest(abstract.params, abstract.optimizer, check, at_most, fresh)
    if found is None:
        return states.start(initial_params(config, program), program.optimizer, program.state), 0
    step, params, optimizer = found
    if optimizer is None:
        return states.start(params, program.optimizer, program.state, step), step
    counter = jax.device_put(jax.numpy.int32(step), program.state.step.sharding)
    return TrainState(step=counter, params=params, optimizer=optimizer), step


def _too_many_skips(config: ConfigDict, metrics: Mapping[str, jax.Array]) -> bool:
    """Whether to roll back; only where that is asked for does the host wait for the step."""
    limit = config.spikes.rollback_after
    return limit > 0 and int(metrics["skips_in_a_row"]) >= limit


def _roll_back(
    config: ConfigDict,
    program: Program,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    loader: Loader,
    state: TrainState,
) -> tuple[TrainState, int]:
    """The state with the parameters of the last regular checkpoint before the skips, and its step.

    Where that checkpoint is not there, a save having failed, its parameters are made again from an older one.

    Raises:
      UserError: the run was rolled back too often.
    """
    rule = memory(state.optimizer)
    assert rule is not None
    done, in_a_row = int(state.step), int(rule.in_a_row)
    rollbacks, before = int(rule.rollbacks), int(rule.rolled_back_at)
    if rollbacks >= config.spikes.max_rollbacks:
        raise UserError(
            f"step {done}: {in_a_row} updates in a row were skipped, and the run was rolled back"
            f" {rollbacks} times already (config.spikes.max_rollbacks); look at the documents of the skips in"
            " metrics.jsonl, or lower config.optimizer.learning_rate, in a new --workdir"
        )
    target = rollback_target(done, in_a_row, config.checkpoint.every_steps, before)
    checkpoints.wait()
    counters = state.optimizer._replace(inner_state=None)
    for leaf in jax.tree.leaves((state.params, rule)):
        leaf.delete()  # two states may be more than the devices hold
    good, at = _first_state(config, program, checkpoints, metadata, at_most=target)
    if at < before:
        raise UserError(
            f"step {done}: cannot roll back to step {target}: no whole checkpoint from step {before} on is left"
        )
    for step in range(at, target):
        good, _ = program.step(good, loader.batch(step))
    return rolled_back(counters, good, state.step, rollbacks + 1), target


def _tokens_until(records: Sequence[Record]) -> int:
    """Target tokens that earlier processes of this run trained on."""
    trained = [record["tokens"] for record in records if record.get("kind") == "train"]
    return trained[-1] if trained else 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _headline(program: Program, config: ConfigDict, step: int) -> str:
    axes = " × ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    tokens = config.train.batch_rows * config.data.sequence_length
    start = f"resuming at step {step}" if step else "starting"
    return (
        f"{start}: {num_params(program.model) / 1e6:,.1f}M parameters, {program.mesh.size}"
        f" {jax.devices()[0].platform} devices ({axes}), {tokens:,} tokens an update, {config.train.steps:,} updates"
    )
