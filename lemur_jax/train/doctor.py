"""Checks everything that a run needs, on every host, before it starts, and logs a table and one verdict."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from lemur_jax.checkpoint.config import CheckpointConfig
from lemur_jax.checkpoint.manager import check_state
from lemur_jax.checkpoint.reading import newest_metadata
from lemur_jax.cluster import coordination
from lemur_jax.cluster.hosts import alone, is_primary
from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.data.mixture import Mixture
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.telemetry.provenance import code_digest, versions
from lemur_jax.telemetry.trackers import check_trackers
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.initial import InitialParams
from lemur_jax.train.inputs import open_stores
from lemur_jax.train.saves import check_data
from lemur_jax.train.state import TrainState
from lemur_jax.train.step import build
from lemur_jax.train.workdir import Changes, check_changes, config_changes

logger = logging.getLogger(__name__)

_SKIPPED = "not looked at, as another check failed"
_CLOCK_SECONDS = 5.0  # hosts whose clocks differ by more make wrong file times and refused credentials


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One check on one host."""

    check: str  # its name
    good: bool  # whether it passed
    detail: str  # what was found
    same: bool = False  # `detail` must be the same on every host


def doctor(config: RunConfig, workdir: epath.PathLike, *, extend: bool = False) -> None:
    """Checks every host of the run and leaves the workdir as it was; all hosts call it together.

    Raises UserError on every host if something would stop the run.
    """
    workdir, values, timeout = epath.Path(workdir), config.to_json(), config.hosts.connect_seconds
    changes: Changes = {}
    tokenizer: Tokenizer | None = None
    mixture: Mixture | None = None
    initial: InitialParams | None = None
    findings: list[Finding] = []
    size = 0  # bytes of a checkpoint
    with _finding(findings, "versions", same=True) as detail:
        detail.append(f"{', '.join(versions())}, code {code_digest()[:12]}")
    with _finding(findings, "config", same=True) as detail:
        changes = config_changes(values, workdir, extend=extend)
        if is_primary():  # only it writes to the trackers
            check_trackers(config.log)
        detail.append(config.fingerprint()[:12])
    with _finding(findings, "devices of a host", same=True) as detail:
        detail.append(f"{jax.local_device_count()} × {jax.local_devices()[0].device_kind}")
    with _finding(findings, "token stores") as detail:
        tokenizer, mixture, _ = open_stores(config)
        mixture.read(*(values[:1] for values in mixture.locate(0)))
        detail.append(f"{len(config.data.sources)} to train on, {len(config.eval.tasks)} held out")
    with _finding(findings, "mesh") as detail:
        program = build(config, make_mesh(config.mesh), num_sources=len(config.data.sources))
        program.trace()
        axes = " × ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
        detail.append(f"{axes} = {program.mesh.size} devices")
        saved = jax.tree.leaves((program.state.params, program.state.optimizer))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in saved)
        if tokenizer:
            initial = InitialParams(
                init=config.init,
                adapter=config.adapter,
                seed=config.seed,
                tokenizer=tokenizer,
                program=program,
                teacher=config.distill.teacher,
            )
    if config.init.checkpoint or config.distill.teacher:
        # Each host reads them alone: one that fails still runs the next check.
        with _finding(findings, "first parameters") as detail, alone():
            resumed = any((workdir / "checkpoints").glob("[0-9]*"))
            origins = dict(newest_metadata(workdir / "checkpoints").get("origins", {}))
            names = initial.check(resumed, origins) if initial else []
            fit = f"{', '.join(names)}: fit the model and the tokenizer"
            detail.append(fit if names else "not needed: the run has checkpoints" if initial else _SKIPPED)
    with _finding(findings, "newest checkpoint") as detail:
        if initial and mixture and all(finding.good for finding in findings):
            state = initial.program.state
            detail.append(_check_newest(workdir, config.checkpoint, changes, values, mixture, state))
        else:
            detail.append(_SKIPPED)
    _check_storage(findings, workdir, timeout)
    findings.append(_free_disk(workdir, size, config.checkpoint.keep))
    with _finding(findings, "collectives") as detail:
        detail.append(_all_reduce_speed())
    _report(findings, timeout)


def _report(findings: list[Finding], timeout: float) -> None:
    """Logs the findings of all hosts as a table; raises where one is bad."""
    payload = json.dumps([socket.gethostname(), [dataclasses.asdict(finding) for finding in findings]])
    hosts = [json.loads(text) for text in coordination.exchange("findings", payload, timeout)]
    names = [f"host {index} ({name})" for index, (name, _) in enumerate(hosts)]
    rows = _merge(names, [[Finding(**finding) for finding in entries] for _, entries in hosts])
    failed = [check for check, good, _ in rows if not good]
    if is_primary():
        width = max(len(check) for check, _, _ in rows)
        for check, good, detail in rows:
            logger.info("%s  %s  %s", "ok  " if good else "FAIL", f"{check:<{width}}", detail)
        if not failed:
            logger.info("verdict: %d host%s ready", len(hosts), "s" * (len(hosts) > 1))
    if failed:
        raise UserError(f"verdict: not ready, because of {', '.join(failed)}")


def _check_newest(
    workdir: epath.Path,
    options: CheckpointConfig,
    changes: Changes,
    values: Mapping[str, Any],
    mixture: Mixture,
    state: TrainState,
) -> str:
    """Checks that the run can resume from its newest checkpoint; UserError where `lemur train` would refuse it."""
    directory = workdir / "checkpoints"
    if not (stored := newest_metadata(directory)):
        return "none yet"
    trees, fresh = {"params": state.params, "optimizer": state.optimizer}, options.other_optimizer == "fresh"
    check_changes(changes, values, stored["step"])
    check_data(directory, mixture.digests(), stored)
    check_state(stored["leaves"], trees, f"checkpoint {directory}/{stored['step']}", fresh)
    return f"step {stored['step']} fits the config and the data"


def _check_storage(findings: list[Finding], workdir: epath.Path, timeout: float) -> None:
    """Writes, reads and removes a file of every host in the workdir."""
    me, count = coordination.process()
    created = not workdir.exists()
    probe = workdir / f".doctor-{me}"
    skew = 0.0
    with _finding(findings, "workdir") as detail:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_start = time.time()
            probe.write_text(str(me))
            write_end = time.time()
            if probe.read_text() != str(me):
                raise UserError("what was written is not what is read")
            mtime = probe.stat().mtime
            skew = max(write_start - mtime, mtime - write_end, 0.0)
        finally:
            coordination.barrier("probes written", timeout)
        if missing := [host for host in range(count) if not (workdir / f".doctor-{host}").exists()]:
            raise UserError(
                f"the files of host {', '.join(map(str, missing))} are not seen here: is it shared?"
            )
        detail.append(f"{workdir}: {'written, read and shared' if count > 1 else 'written and read'}")
    clocks = [float(text) for text in coordination.exchange("clock", str(time.time()), timeout)]
    spread = max(clocks) - min(clocks)
    hosts = f"hosts differ by {spread:.1f} s" if count > 1 else "one host"
    good, clock = max(spread, skew) <= _CLOCK_SECONDS, f"{hosts}, the workdir's storage by {skew:.1f} s"
    findings.append(Finding(check="clock", good=good, detail=clock))
    coordination.barrier("probes seen", timeout)
    with contextlib.suppress(OSError):
        probe.unlink()
    # The first host made the directory; once all have answered, every host has removed its file.
    created = str(True) in coordination.exchange("workdir made", str(created), timeout)
    if created and me == 0:
        with contextlib.suppress(OSError):
            workdir.rmdir()  # refuses where something is in it


def _free_disk(workdir: epath.Path, size: int, keep: int) -> Finding:
    """Disk space for the checkpoints that are kept and the one that is being written."""
    if "://" in os.fspath(workdir):
        return Finding(check="free disk", good=True, detail="an object store: not bounded")
    directory = workdir
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    need = size * (keep + 1)
    detail = f"{free / 1e9:,.1f} GB free, {need / 1e9:,.1f} GB needed for {keep} + 1 checkpoints"
    return Finding(check="free disk", good=free >= need, detail=detail)


def _all_reduce_speed() -> str:
    """Seconds of an all-reduce over all devices, and its speed in bytes per second and device."""
    count = jax.device_count()
    if count == 1:
        return "one device: none needed"
    mib = 64 if jax.default_backend() != "cpu" else 1
    mesh = jax.sharding.Mesh(jax.devices(), ("all",))
    rows, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["all"], []))
    array = jax.jit(lambda: jnp.ones((count, mib * 2**18), jnp.float32), out_shardings=rows)()
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=replicated)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        result = jax.block_until_ready(total(array))
        seconds.append(time.perf_counter() - started)
    if float(result.addressable_shards[0].data[0]) != count:
        raise UserError("an all-reduce over all devices gave a wrong sum")
    # A ring all-reduce sends 2 (n - 1) / n times the bytes of a device; the first round compiled.
    best = min(seconds[1:])
    speed = 2 * (count - 1) / count * mib * 2**20 / best
    return f"all-reduce of {mib} MiB in {best * 1e3:.1f} ms = {speed / 1e9:.2f} GB/s a device"


@contextlib.contextmanager
def _finding(findings: list[Finding], check: str, *, same: bool = False) -> Iterator[list[str]]:
    """A context that adds a finding: what its body has put into the list, or the error that ended it."""
    detail: list[str] = []
    try:
        yield detail
        passed = True
    except (UserError, OSError, ValueError, RuntimeError) as error:
        passed, detail = False, [" ".join(str(error).split()) or type(error).__name__]
    findings.append(Finding(check=check, good=passed, detail="; ".join(detail), same=same))


def _merge(names: list[str], hosts: list[list[Finding]]) -> list[tuple[str, bool, str]]:
    """(check, good, detail) of all hosts; a detail that is not good says on which."""
    rows = []
    for findings in zip(*hosts, strict=True):
        reference = findings[0]
        problems = []
        for name, finding in zip(names, findings, strict=True):
            if not finding.good:
                problems.append(f"{name}: {finding.detail}")
            elif reference.same and finding.detail != reference.detail:
                problems.append(f"{name}: {finding.detail}, but {names[0]}: {reference.detail}")
        rows.append((reference.check, not problems, "; ".join(problems) or reference.detail))
    return rows
