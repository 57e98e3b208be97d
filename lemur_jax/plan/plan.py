"""`lemur plan`: whether a config fits a TPU slice, and an estimate of how fast it trains there."""

import dataclasses
import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from lemur_jax.common.progress import duration
from lemur_jax.config import RunConfig
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.plan import analytic, cost, hlo
from lemur_jax.plan.compile import Compiled, compile_program, device_bytes
from lemur_jax.plan.topologies import Slice, described_devices, find_slice
from lemur_jax.telemetry import flops
from lemur_jax.train.step import build

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a program on a slice. Every time and rate is an estimate.

    Attributes:
      topology, slices, chips: the slice.
      mesh: sizes of the mesh axes.
      fits, verdict: whether the compiler could allocate the memory, and its message if not.
      compile_seconds: lowering and compiling on this machine.
      hbm_bytes_per_chip: most in use at a time; the requested HBM if the program does not fit.
      hbm_limit_bytes_per_chip: what a program may use.
      hbm: bytes per chip by kind; `temporaries` is the rest of the peak. `activations` are those kept for the backward
        pass.
      host_bytes_per_chip: host memory in use.
      largest_buffers: [bytes per chip, description] if the program does not fit: from the compiler, or if its message
        has none, from `analytic.lower_bound`.
      tokens_per_step: tokens of one execution.
      step_seconds: of one execution.
      unestimated: executed instructions for which the compiler has no estimate; `step_seconds` leaves them out.
      parts: seconds by part: matmul, attention kernels, other compute, exposed communication.
      collectives: one row per kind: count, bytes of each chip, seconds, exposed, hidden.
      tokens_per_second_per_chip: of the step.
      mfu, mfu_full_attention: of an update, with attention counted causal, and full.
      days, chip_hours: for all updates of the config.
      versions: of jax and libtpu.
    """

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    fits: bool
    verdict: str
    compile_seconds: float
    hbm_bytes_per_chip: int
    hbm_limit_bytes_per_chip: int
    hbm: dict[str, int]
    host_bytes_per_chip: int
    largest_buffers: list[list[Any]]
    tokens_per_step: int
    step_seconds: float | None = None
    unestimated: int = 0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tokens_per_second_per_chip: float | None = None
    mfu: float | None = None
    mfu_full_attention: float | None = None
    days: float | None = None
    chip_hours: float | None = None
    versions: dict[str, str]

    @property
    def tokens_per_second(self) -> float | None:
        """Of all chips; None if the program does not fit."""
        return self.step_seconds and self.tokens_per_step / self.step_seconds


def plan(config: RunConfig, topology: str, *, slices: int = 1, hlo_path: str | None = None) -> Plan:
    """Compiles a config's update for a slice and estimates its time.

    Args:
      config: a run config; neither its data nor its tokenizer is opened.
      topology: a slice's name, e.g. "v4-512"; `topologies.slice_names()` lists them.
      slices: slices joined by the data-centre network.
      hlo_path: where to write the optimized HLO text of the update.

    Raises:
      UserError: an unknown slice or compiler option, libtpu is missing, or the mesh does not divide the model or the
        batch.
    """
    tpu = find_slice(topology, slices)
    mesh = make_mesh(config.mesh, described_devices(tpu))
    program = build(config, mesh, num_sources=max(1, len(config.data.sources)))
    name = f"the update for {slice_name(topology, slices)}"
    compiled = compile_program(program.step, program.state, program.batch, what=name)
    if hlo_path and compiled.hlo:
        epath.Path(hlo_path).write_text(compiled.hlo)
    layers = config.model.num_hidden_layers
    trees = program.state.params, program.state.frozen
    parameters = [tree["layers"] for tree in trees if tree and "layers" in tree]
    sizes = {
        "parameters": device_bytes(program.state.params),
        "frozen parameters": device_bytes(program.state.frozen),
        "optimizer": device_bytes(program.state.optimizer),
        "batch": device_bytes(program.batch),
        "activations": kept_activations(compiled.module, layers, parameters) if compiled.module else 0,
    }
    if not compiled.fits and not compiled.largest:
        compiled = dataclasses.replace(compiled, largest=analytic.lower_bound(config, tpu).buffers)
    estimate = estimate_cost(compiled, tpu, program.mesh)
    length = config.data.sequence_length
    result = program_plan(compiled, estimate, tpu, program.mesh, sizes, config.train.batch_rows * length)
    rate = result.tokens_per_second
    if rate is None:
        return result
    peak, adapted = tpu.chips * flops.chip(tpu.generation.device_kind).bf16_flops, config.adapter.rank > 0
    causal, full = (
        flops.mfu(rate, flops.train_flops_per_token(config.model, length, adapted, causal=only), peak)
        for only in (True, False)
    )
    hours = config.train.steps * result.tokens_per_step / rate / 3600
    return dataclasses.replace(
        result, mfu=causal, mfu_full_attention=full, days=hours / 24, chip_hours=hours * tpu.chips
    )


def estimate_cost(
    compiled: Compiled, tpu: Slice, mesh: Mesh, uncounted: int | None = None
) -> cost.Cost | None:
    """The estimate of a program that fits; `uncounted` as for `cost.Estimator`."""
    if compiled.module is None:
        return None
    network = cost.Network(tpu, list(mesh.devices.flat))
    estimate = cost.Estimator(compiled.module, network, uncounted).run()
    check_host_transfers(compiled, estimate)
    return estimate


def program_plan(
    compiled: Compiled, estimate: cost.Cost | None, tpu: Slice, mesh: Mesh, known: dict[str, int], tokens: int
) -> Plan:
    """The plan of a compiled program.

    Args:
      known: bytes per device by kind; the rest of the peak is `temporaries`.
      tokens: of one execution.
    """
    per_chip = tpu.generation.devices_per_chip
    # A program may leave some parameters unread, as prefill the head: they are in memory nevertheless.
    peak = max(compiled.peak_bytes, sum(known.values())) if compiled.fits else compiled.peak_bytes
    kinds = {**known, "temporaries": max(0, peak - sum(known.values()))}
    estimated: dict[str, Any] = {}
    if estimate:
        rows = sorted(estimate.traffic.items(), key=lambda item: -item[1].seconds)
        estimated = {
            "step_seconds": estimate.seconds,
            "unestimated": round(estimate.unestimated),
            "parts": {**estimate.compute, "exposed communication": estimate.exposed},
            "collectives": [
                dataclasses.asdict(traffic)
                | {"kind": kind, "bytes": traffic.bytes * per_chip}
                | {"hidden": max(0.0, traffic.seconds - traffic.exposed)}
                for kind, traffic in rows
            ],
            "tokens_per_second_per_chip": tokens / estimate.seconds / tpu.chips,
        }
    return Plan(
        topology=tpu.name,
        slices=tpu.slices,
        chips=tpu.chips,
        mesh=dict(mesh.shape),
        fits=compiled.fits,
        verdict=compiled.verdict,
        compile_seconds=compiled.seconds,
        hbm_bytes_per_chip=peak * per_chip,
        hbm_limit_bytes_per_chip=tpu.generation.hbm * per_chip,
        hbm={kind: size * per_chip for kind, size in kinds.items()},
        host_bytes_per_chip=compiled.host_bytes * per_chip,
        largest_buffers=[[size * per_chip, what] for size, what in compiled.largest],
        tokens_per_step=tokens,
        versions={"jax": jax.__version__, "libtpu": metadata.version("libtpu")},
        **estimated,
    )


def check_host_transfers(compiled: Compiled, estimate: cost.Cost) -> None:
    """Refuses an estimate in which transfers of offloaded arrays are missing.

    Each array goes to the host and comes back. Where the compiler peels a layer off its loop, that layer's arrays lie
    in host memory twice, so the transfers of one layer are 1.5 times its host memory, and of many layers twice.

    Raises:
      ValueError: the transfers found in the program's text are fewer.
    """
    moved = estimate.traffic.get(cost.HOST, cost.Traffic()).bytes
    if moved < 1.5 * compiled.host_bytes:
        raise ValueError(
            f"the program keeps {compiled.host_bytes} bytes in host memory, but only {moved:.0f} bytes of transfers"
            " were found in its HLO: the compiler writes some in a form that plan/hlo.py does not know"
        )


def kept_activations(module: hlo.Module, layers: int, parameters: Any) -> int:
    """Bytes of HBM per device that the forward pass of the layers keeps for the backward pass.

    These are the arrays that its loop over the layers carries with a leading axis L, other than parameters. Where the
    compiler peels one layer off the loop, the axis may be L - 1, its trip count.

    Args:
      parameters: of the layers, ShapeDtypeStructs with shardings.
    """
    stacked = {
        tuple(sorted(leaf.sharding.shard_shape(leaf.shape)[1:])) for leaf in jax.tree.leaves(parameters)
    }
    totals = [
        sum(
            hlo.bytes_of(dtype) * math.prod(sizes)
            for dtype, sizes in hlo.shapes(hlo.on_device(loop.shape))
            if len(sizes) > 2 and sizes[0] in (layers, trips) and tuple(sorted(sizes[1:])) not in stacked
        )
        for loop, trips in forward_loops(module, layers)
    ]
    return int(max(totals, default=0))


def forward_loops(module: hlo.Module, layers: int) -> Iterator[tuple[hlo.Instruction, int]]:
    """The loops over the layers in the forward pass, and their trip counts.

    Where the compiler peels one layer off, a loop runs once less and may lose its name; the first unnamed one of a
    computation is that of the forward pass.
    """
    for computation, body in module.computations.items():
        peeled = False
        for loop in (instr for instr in body.values() if instr.opcode == "while"):
            named = "jvp(" in loop.op_name and "transpose(" not in loop.op_name
            if not named and (loop.op_name or peeled):
                continue
            trips = hlo.trip_count(module, computation, loop)
            if trips == layers - 1 or (named and trips == layers):
                peeled = peeled or not named
                yield loop, trips


def slice_name(topology: str, slices: int) -> str:
    """E.g. "2 x v4-32"."""
    return f"{slices} x {topology}" if slices > 1 else topology


def format_plan(plan: Plan) -> str:
    """The plan as text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"{slice_name(plan.topology, plan.slices)}: {plan.chips} chip{'s' * (plan.chips > 1)}, mesh {mesh};"
        f" compiled in {plan.compile_seconds:.0f} s with libtpu {plan.versions['libtpu']}",
        "",
    ]
    refusal = plan.verdict.strip().partition("\n")[0]
    if not plan.fits and plan.hbm_bytes_per_chip == 0:  # another memory is too small
        return "\n".join([*lines, f"DOES NOT FIT: {refusal}"])
    used, limit = plan.hbm_bytes_per_chip / GIB, plan.hbm_limit_bytes_per_chip / GIB
    lines.append(f"{'FITS' if plan.fits else 'DOES NOT FIT'}: {used:.2f} GiB of {limit:.2f} GiB HBM per chip")
    kinds = {**plan.hbm, "(in host memory)": plan.host_bytes_per_chip}
    lines += [f"  {kind:<22}{size / GIB:10.2f} GiB" for kind, size in kinds.items() if size]
    if plan.fits:
        return "\n".join([*lines, "", *_format_step(plan)])
    buffers = [f"  {size / GIB:8.2f} GiB  {what}" for size, what in plan.largest_buffers]
    excess = f"{used - limit:.2f} GiB too much per chip; the largest buffers:"
    return "\n".join([*lines, "", excess, *buffers, "", refusal])


def _format_step(plan: Plan) -> list[str]:
    """The estimates of a plan that fits."""
    assert plan.step_seconds is not None
    unit, scale = ("s", 1.0) if plan.step_seconds >= 1 else ("ms", 1e3)
    lines = [
        f"ESTIMATED step of {plan.tokens_per_step:,} tokens: {scale * plan.step_seconds:.3f} {unit} (not measured)"
    ]
    if plan.unestimated:
        lines.append(f"  without {plan.unestimated:,} instructions for which the compiler has no estimate")
    for part, seconds in sorted(plan.parts.items(), key=lambda item: -item[1]):
        lines.append(f"  {part:<22}{scale * seconds:10.3f} {unit}  {seconds / plan.step_seconds:6.1%}")
    if plan.collectives:
        lines += [
            "",
            f"  {'collective':<22}{'count':>8}{'GB per chip':>12}{'on wire':>12}{'exposed':>12}{'hidden':>12}",
        ]
    for row in plan.collectives:
        times = (f"{scale * row[time]:9.3f} {unit:<2}" for time in ("seconds", "exposed", "hidden"))
        lines.append(f"  {row['kind']:<22}{row['count']:8.0f}{row['bytes'] / 1e9:12.3f}{''.join(times)}")
    lines += ["", f"  {plan.tokens_per_second_per_chip:,.0f} tokens/s/chip"]
    if plan.mfu is not None:
        lines[-1] += f", MFU {plan.mfu:.1%} with causal attention, {plan.mfu_full_attention:.1%} with full"
        hours = plan.chip_hours or 0.0
        hours_text = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
        lines.append(
            f"  {duration(86_400 * (plan.days or 0.0))}, {hours_text} chip-hours for the config's updates"
        )
    return lines
