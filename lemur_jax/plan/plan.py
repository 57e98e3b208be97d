"""`lemur plan`: whether a config fits a TPU slice, and an estimate of how fast it trains there."""

import dataclasses
import json
from typing import Any

import jax
from etils import epath

from lemur_jax.config import RunConfig
from lemur_jax.plan import analytic, cost, hlo, topologies
from lemur_jax.plan import compile as compiling
from lemur_jax.telemetry import flops

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config costs on a slice. Every time and rate is an estimate, none a measurement.

    Attributes:
      topology, slices, chips: the slice.
      mesh: sizes of the mesh axes.
      fits: the compiler's verdict.
      verdict: its message where it does not fit.
      compile_seconds: lowering and compiling, on this machine.
      hbm_bytes_per_chip: most in use at a time; where it does not fit, what was asked for.
      hbm_limit_bytes_per_chip: what a program may use.
      hbm: bytes a chip by kind: parameters, optimizer, batch, activations (kept for the backward
        pass), temporaries (the rest of the peak: gradients, gathered weights, workspace).
      host_bytes_per_chip: host memory in use.
      largest_buffers: [bytes, description] where it does not fit: the compiler's list, or where its refusal holds
        none, the largest arrays of the state and of what the layers keep, by their shapes.
      tokens_per_step: tokens of one update.
      step_seconds: of one update.
      parts: seconds by part: matmul, attention kernels, other compute, exposed communication.
      collectives: one row a kind: count, bytes, seconds, exposed, hidden.
      largest_instructions: [seconds, name, where it comes from].
      tokens_per_second_per_chip, mfu, mfu_full_attention: MFU with attention counted causal, and full.
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
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    largest_instructions: list[list[Any]] = dataclasses.field(default_factory=list)
    tokens_per_second_per_chip: float | None = None
    mfu: float | None = None
    mfu_full_attention: float | None = None
    days: float | None = None
    chip_hours: float | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def plan(
    config: RunConfig,
    topology: str,
    *,
    slices: int = 1,
    options: compiling.Options | None = None,
    hlo_path: str | None = None,
) -> Plan:
    """Compiles a config's update for a slice and estimates its time.

    Args:
      config: a run config; neither its data nor its tokenizer is opened.
      topology: a slice's name, e.g. "v4-512"; `topologies.names()` lists them.
      slices: slices joined by the data-centre network.
      options: compiler options beyond those of parallel/compiler_flags.py.
      hlo_path: where to write the optimized HLO text of the update.

    Raises:
      UserError: an unknown slice, libtpu is missing, or the mesh does not divide the model or the batch.
    """
    tpu = topologies.find(topology, slices)
    program = compiling.program(config, tpu)
    compiled = compiling.compile_step(program, options)
    if hlo_path and compiled.hlo:
        epath.Path(hlo_path).write_text(compiled.hlo)
    per_chip = tpu.generation.devices_per_chip
    module = hlo.parse(compiled.hlo) if compiled.hlo else None
    known = {
        "parameters": compiling.device_bytes(program.state.params),
        "optimizer": compiling.device_bytes(program.state.optimizer),
        "batch": compiling.device_bytes(program.batch),
        "activations": kept_activations(module, program) if module else 0,
    }
    known["temporaries"] = max(0, compiled.peak_bytes - sum(known.values()))
    facts = dict(
        topology=topology,
        slices=slices,
        chips=tpu.chips,
        mesh=dict(program.mesh.shape),
        fits=compiled.fits,
        verdict=compiled.verdict,
        compile_seconds=compiled.seconds,
        hbm_bytes_per_chip=compiled.peak_bytes * per_chip,
        hbm_limit_bytes_per_chip=cost.CHIPS[tpu.generation.name].hbm * per_chip,
        hbm={kind: size * per_chip for kind, size in known.items()},
        host_bytes_per_chip=compiled.host_bytes * per_chip,
        largest_buffers=_largest_buffers(config, tpu, compiled),
        tokens_per_step=config.train.batch_rows * config.data.sequence_length,
        versions={"jax": jax.__version__, "libtpu": _libtpu_version()},
    )
    if module:
        network = cost.Network(tpu, cost.places(program.mesh.devices.flat, tpu))
        facts |= _estimates(config, tpu, program, cost.Estimator(module, network).run())
    return Plan(**facts)


def _largest_buffers(
    config: RunConfig, tpu: topologies.Slice, compiled: compiling.Compiled
) -> list[list[Any]]:
    """[bytes a chip, description], largest first, where the program does not fit."""
    if compiled.fits:
        return []
    named = compiled.largest or analytic.largest(config, tpu)
    return [[size * tpu.generation.devices_per_chip, what] for size, what in named]


def _estimates(config: RunConfig, tpu: topologies.Slice, program, estimate: cost.Cost) -> dict[str, Any]:
    """The fields of a Plan that follow from the estimated time."""
    tokens = config.train.batch_rows * config.data.sequence_length
    rate = tokens / estimate.seconds
    model = config.model
    peak = tpu.chips * flops.chip(program.mesh.devices.flat[0].device_kind).bf16_flops
    causal, full = (
        flops.mfu(rate, flops.flops_per_token(model, config.data.sequence_length, causal=causal).total, peak)
        for causal in (True, False)
    )
    seconds = config.train.steps * estimate.seconds
    return dict(
        step_seconds=estimate.seconds,
        parts={**estimate.compute, "exposed communication": estimate.exposed},
        collectives=[
            dict(kind=kind, **dataclasses.asdict(traffic), hidden=max(0.0, traffic.seconds - traffic.exposed))
            for kind, traffic in sorted(estimate.traffic.items(), key=lambda item: -item[1].seconds)
        ],
        largest_instructions=[list(each) for each in estimate.largest],
        tokens_per_second_per_chip=rate / tpu.chips,
        mfu=causal,
        mfu_full_attention=full,
        days=seconds / 86_400,
        chip_hours=seconds / 3600 * tpu.chips,
    )


def kept_activations(module: hlo.Module, program) -> int:
    """Bytes a device that the forward pass of the layers keeps for the backward pass.

    They are what its loop over the layers carries with a leading axis L, other than parameters.
    """
    L = program.model.num_hidden_layers
    stacked = {
        tuple(sorted(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(program.state.params["layers"])
    }
    most = 0
    for computation, body in module.computations.items():
        for loop in body:
            if loop.opcode != "while" or "transpose(" in loop.op_name or "jvp(" not in loop.op_name:
                continue
            if hlo.trip_count(module, computation, loop) != L:
                continue
            kept = [
                hlo.BYTES[dtype] * _product(sizes)
                for dtype, sizes in hlo.shapes(hlo.on_device(loop.shape))
                if len(sizes) > 2 and sizes[0] == L and tuple(sorted(sizes)) not in stacked
            ]
            most = max(most, int(sum(kept)))
    return most


def _product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _libtpu_version() -> str:
    from importlib import metadata

    return metadata.version("libtpu")


def report(plan: Plan) -> str:
    """The plan as text."""
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"{slices}{plan.topology}: {plan.chips} chip{'s' * (plan.chips > 1)}, mesh {mesh};"
        f" compiled in {plan.compile_seconds:.0f} s with libtpu {plan.versions['libtpu']}",
        "",
        f"{'FITS' if plan.fits else 'DOES NOT FIT'}: {plan.hbm_bytes_per_chip / GIB:.2f} GiB of"
        f" {plan.hbm_limit_bytes_per_chip / GIB:.2f} GiB HBM a chip",
    ]
    lines += [f"  {kind:<22}{size / GIB:10.2f} GiB" for kind, size in plan.hbm.items() if size]
    if plan.host_bytes_per_chip:
        lines.append(f"  {'(in host memory)':<22}{plan.host_bytes_per_chip / GIB:10.2f} GiB")
    if not plan.fits and plan.hbm_bytes_per_chip == 0:  # another memory is too small
        return "\n".join([lines[0], "", f"DOES NOT FIT: {plan.verdict.strip().splitlines()[0]}"])
    if not plan.fits:
        over = (plan.hbm_bytes_per_chip - plan.hbm_limit_bytes_per_chip) / GIB
        lines += ["", f"{over:.2f} GiB too much a chip; the largest buffers:"]
        lines += [f"  {size / GIB:8.2f} GiB  {what}" for size, what in plan.largest_buffers]
        return "\n".join([*lines, "", plan.verdict.strip().splitlines()[0]])
    assert plan.step_seconds is not None  # what fits is estimated
    unit, scale = ("s", 1.0) if plan.step_seconds >= 1 else ("ms", 1e3)
    lines += [
        "",
        f"ESTIMATED step of {plan.tokens_per_step:,} tokens: {scale * plan.step_seconds:.3f} {unit} (not measured)",
    ]
    lines += [
        f"  {part:<22}{scale * seconds:10.3f} {unit}  {seconds / plan.step_seconds:6.1%}"
        for part, seconds in sorted(plan.parts.items(), key=lambda item: -item[1])
    ]
    if plan.collectives:
        lines += [
            "",
            f"  {'collective':<22}{'count':>8}{'GB':>10}{'on wire':>12}{'exposed':>12}{'hidden':>12}",
        ]
    lines += [
        f"  {row['kind']:<22}{row['count']:8.0f}{row['bytes'] / 1e9:10.3f}"
        + "".join(f"{scale * row[time]:9.3f} {unit:<2}" for time in ("seconds", "exposed", "hidden"))
        for row in plan.collectives
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"  {plan.tokens_per_second_per_chip:,.0f} tokens/s/chip, MFU {plan.mfu:.1%} with causal attention,"
            f" {plan.mfu_full_attention:.1%} with full",
            f"  {plan.days:,.1f} days, {plan.chip_hours:,.0f} chip-hours for the config's updates",
        ]
    )
