"""The training loop of every stage: mesh, data, model, state, then step after step."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath

from lemur_jax.checkpoint.manager import make_metadata
from lemur_jax.cluster.hosts import any_host, wait_for_all
from lemur_jax.cluster.lock import WAIT_SECONDS, workdir_lock
from lemur_jax.cluster.preemption import Interruption
from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig, to_json
from lemur_jax.data.budget import budget, check_budget, format_budget
from lemur_jax.data.loader import Loader
from lemur_jax.data.mixture import open_mixture
from lemur_jax.models.llama import num_params
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import batch_sharding
from lemur_jax.telemetry.metrics import MetricsWriter
from lemur_jax.telemetry.profiler import check_steps, trace_steps
from lemur_jax.telemetry.progress import Progress
from lemur_jax.telemetry.provenance import start_record
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.evaluate import Evaluations, open_held_out, unscored
from lemur_jax.train.journal import Journal, open_journal
from lemur_jax.train.saves import Saves, due
from lemur_jax.train.spikes import too_many_skips
from lemur_jax.train.state import TrainState
from lemur_jax.train.step import Program, build
from lemur_jax.train.steplog import StepLog
from lemur_jax.train.workdir import check_owner, claim


def train(
    config: RunConfig,
    workdir: epath.PathLike,
    say: Callable[[str], None] = print,
    build: Callable[..., Program] = build,
    profile: range = range(0),
) -> bool:
    """Trains until `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Killed at any moment and called again, it reaches the parameters that it would have reached: the
    batch of a step depends on the step alone, and a checkpoint holds all the rest.

    Args:
      config: a run config.
      workdir: gets `config.json`, `metrics.jsonl` and `checkpoints/`; meanwhile `running.json` on an object store.
      say: gets what a person wants to read.
      build: makes the program; several runs of one process may share one (`sweep/runner.py`).
      profile: steps of which every host writes a trace to `WORKDIR/profile`.

    Returns:
      Whether a SIGTERM came: no other work should begin.

    Raises:
      UserError: the config, the data, the workdir and `profile` do not fit together, or the loss is not finite.
    """
    began, started = time.perf_counter(), time.time()
    check_steps(profile, config.train.steps)
    mesh = make_mesh(config.mesh)
    chief = jax.process_index() == 0

    tokenizer = Tokenizer.load(config.tokenizer.path)
    mixture = open_mixture(config.data, tokenizer, seed=config.seed, batch_rows=config.train.batch_rows)
    held_out = open_held_out(config.data, config.eval.tasks, tokenizer)
    needs = budget(mixture, config.train.steps)
    check_budget(needs)

    program = build(config, mesh, num_sources=len(mixture.sources))
    _check_vocabulary(config, tokenizer)

    workdir = check_owner(config, workdir)
    metadata = make_metadata(
        model=program.model.to_dict(),
        tokenizer_files=tokenizer.files(),
        config=to_json(config),
        data=mixture.digests(),
    )
    with contextlib.ExitStack() as stack:
        if chief:
            stack.enter_context(workdir_lock(workdir))
        wait_for_all("workdir", 2 * WAIT_SECONDS)  # collectives would not wait so long for host 0
        saves = stack.enter_context(Saves(config, workdir, program, tokenizer, metadata, say))
        state, first = saves.first_state()
        if chief:  # not before: what is wrong with the first parameters can be mended in the config
            claim(config, workdir)

        journal = Journal()
        if chief:
            journal = stack.enter_context(open_journal(config.log, workdir, first, started))
        missing = unscored(config, journal.records, first) if chief else set()
        owed = [task.task for task in held_out if any_host(task.task in missing)]
        if first == config.train.steps and not owed:
            say(f"{workdir}: already finished at step {first}")
            return False
        if profile and profile.start < first:
            say(f"no trace: step {profile.start} of --profile was made before this start")
        if chief:
            say(format_budget(needs))
            say(_headline(program, config, first))

        progress = stack.enter_context(
            Progress(config.train.steps, f"train {workdir.name}", "steps", initial=first, enabled=chief)
        )
        writer, records = journal.writer, journal.records
        log = StepLog(writer, progress, mixture, journal.last_train_record, journal.spent, program, began)
        if writer:
            writer.write(start_record(first))
        if not first:
            log.write_time(0)  # the first start, from which goodput counts
        interruption = stack.enter_context(Interruption(config.checkpoint.grace_s))
        evaluations = Evaluations(
            program, config, held_out, writer, say if chief else _silent, records, interruption.reached
        )
        between = _BetweenSteps(
            config=config,
            saves=saves,
            evaluations=evaluations,
            interruption=interruption,
            log=log,
            writer=writer,
        )
        if owed and between.stopping_at_start(state, first, owed):
            say(f"SIGTERM: no step was made after step {first}; the same command goes on from there")
            return True
        loader = Loader(mixture, batch_sharding(mesh))
        batches = log.waiting(loader.iterate(first, config.train.steps))
        for step, batch in trace_steps(batches, profile, workdir / "profile", finish=log.flush):
            state, metrics = program.step(state, batch)
            done = step + 1
            log.add(done, metrics)
            undoing = too_many_skips(config.spikes, metrics)
            if undoing:
                log.flush()
                with log.paused("checkpoint"):
                    state, target = saves.roll_back(state, loader)
                log.rolled_back(done, target)
            if between.stopping(state, done, undoing):
                say(f"SIGTERM: step {done} is saved; the same command goes on from there")
                return True
        return interruption.asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BetweenSteps:
    """What is done after an update where its turn has come: evaluate, save, write the log."""

    config: RunConfig
    saves: Saves
    evaluations: Evaluations
    interruption: Interruption
    log: StepLog
    writer: MetricsWriter | None

    def stopping_at_start(self, state: TrainState, step: int, owed: Sequence[str]) -> bool:
        """Scores, before the first update, what an earlier process did not; whether a SIGTERM has come.

        Args:
          step: updates done.
          owed: the tasks.
        """
        with self.log.paused("eval"):
            self.evaluations.score(state.params, step, owed)
        if self.writer:
            self.writer.sync()
        wait_for_all("evaluation")  # each host may look whether it is there
        return self.interruption.asked

    def stopping(self, state: TrainState, done: int, undoing: bool) -> bool:
        """Does it after update `done`; whether a SIGTERM has come, and that update is saved.

        Args:
          undoing: the update was followed by a rollback, whose state is to be saved.
        """
        last = done == self.config.train.steps
        stopping = self.interruption.reached()
        saving = last or stopping or undoing or self.saves.due(done)
        scored = last or due(done, self.config.eval.every_steps) or (saving and self.saves.needs_loss(done))
        evaluating = bool(self.config.eval.tasks) and scored and not stopping
        if evaluating or saving:
            self.log.flush()  # parameters that are not finite are never saved
            losses: dict[str, float] = {}
            if evaluating:
                with self.log.paused("eval"):
                    losses = self.evaluations.score(state.params, done)
                stopping = self.interruption.asked  # meanwhile, too
            if saving or stopping:
                self._save(done, state, losses, to_the_end=last or stopping)
        elif due(done, self.config.log.every_steps):
            self.log.flush(keep=1)  # the newest step may still be running
        return stopping

    def _save(self, done: int, state: TrainState, losses: dict[str, float], to_the_end: bool) -> None:
        with self.log.paused("checkpoint"):
            self.log.write_time(done)
            if self.writer:
                self.writer.sync()
            self.saves.save(done, state, losses, to_the_end)


def _silent(line: str) -> None:
    """Takes the lines of hosts that print nothing."""


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer {config.tokenizer.path} has {tokenizer.vocab_size} tokens, config.model.vocab_size is"
            f" {config.model.vocab_size}: it must be at least as large"
        )


def _headline(program: Program, config: RunConfig, step: int) -> str:
    axes = " × ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    tokens = config.train.batch_rows * config.data.sequence_length
    start = f"resuming at step {step}" if step else "starting"
    return (
        f"{start}: {num_params(program.model) / 1e6:,.1f}M parameters, {program.mesh.size}"
        f" {jax.devices()[0].platform} devices ({axes}), {tokens:,} tokens an update, {config.train.steps:,} updates"
    )
