"""Estimates how long a compiled step takes on the slice that it was compiled for.

Nothing here is measured. Computation: the compiler's own cycle counts, each loop body times its trip count.
Collectives: bytes over the links that the group spans. Attention kernels: a model fitted to the compiler's static
schedules of them (plan/kernels.py). docs/planner_details.md has the assumptions.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax

from lemur_jax.plan import hlo, kernels
from lemur_jax.plan.topologies import Slice

# Seconds for a message to pass one chip.
HOP = 1e-6

# Parts of the computing time.
MATMUL, ATTENTION, OTHER = "matmul", "attention kernels", "other compute"
HOST = "host transfer"
# Added to the name of a collective that crosses the data-centre network.
BETWEEN = ", slices"


@dataclasses.dataclass(kw_only=True)
class Traffic:
    """One kind of transfer in a step: executions, bytes of each device, seconds on the wire and seconds not hidden."""

    count: float = 0
    bytes: float = 0
    seconds: float = 0
    exposed: float = 0

    def add(self, other: "Traffic", times: float = 1) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


@dataclasses.dataclass(kw_only=True)
class Cost:
    """Estimated seconds of a program, of its computation by part, and its traffic by kind ("all-reduce, slices").

    `unestimated` is the number of executed instructions for which the compiler has no estimate: they add no seconds.
    """

    seconds: float = 0
    unestimated: float = 0
    compute: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    traffic: dict[str, Traffic] = dataclasses.field(default_factory=lambda: collections.defaultdict(Traffic))

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds `times` executions of `other`, one after the other."""
        self.seconds += times * other.seconds
        self.unestimated += times * other.unestimated
        for part, seconds in other.compute.items():
            self.compute[part] += times * seconds
        for kind, traffic in other.traffic.items():
            self.traffic[kind].add(traffic, times)

    @property
    def exposed(self) -> float:
        """Seconds in which the device waits for a transfer."""
        return sum(traffic.exposed for traffic in self.traffic.values())


class Network:
    """Time on the wire of a collective on a slice.

    Assumes that every ring of the group carries its share at full speed: a closed axis has two links per chip, an open
    axis, or one of two chips, has one.
    """

    def __init__(self, tpu: Slice, devices: Sequence[jax.Device]):
        """`devices`: described devices in the order of the device assignment."""
        self.tpu, self.chip = tpu, tpu.generation
        # (slice, x, y, ...) of each device.
        self.places = [
            (getattr(each, "slice_index", None) or 0, *each.coords[: len(tpu.shape)]) for each in devices
        ]

    def leaves_slice(self, devices: Sequence[int]) -> bool:
        return len({self.places[device][0] for device in devices}) > 1

    def _axes(self, group: list[int]) -> tuple[list[tuple[int, int]], int]:
        """[(chips, links)] of each torus axis that the group spans, and the number of slices that it spans."""
        spans = [len(set(values)) for values in zip(*(self.places[device] for device in group), strict=True)]
        axes = []
        for span, size, wrap in zip(spans[1:], self.tpu.shape, self.tpu.wrap, strict=True):
            if span > 1:
                axes.append((span, 2 if wrap and span == size and size > 2 else 1))
        return axes, spans[0]

    def seconds(self, kind: str, group: list[int], size: float) -> float:
        """Seconds of one execution.

        Args:
          kind: opcode without -start.
          group: participating devices.
          size: bytes per device: of the whole result for an all-gather, else of the operand.
        """
        devices = len(group)
        if devices == 1 or not size:
            return 0.0
        axes, slices = self._axes(group)
        passes = 2 if kind == "all-reduce" else 1
        per_slice = devices // slices
        links = sum(count for _, count in axes) or 1
        hops = sum(span / 2 if count == 2 else span - 1 for span, count in axes)
        if kind in ("all-to-all", "ragged-all-to-all"):
            distance = sum(span / 4 if count == 2 else span / 3 for span, count in axes)
            seconds = size / devices * (devices - 1) * distance / (links * self.chip.link)
        else:
            seconds = passes * size * (per_slice - 1) / per_slice / (links * self.chip.link)
        if slices > 1:  # each device sends its own share
            seconds += passes * size / per_slice * (slices - 1) / slices / self.chip.dcn
        return seconds + passes * hops * HOP

    def transfer(self, pairs: list[tuple[int, int]], size: float) -> float:
        """Seconds of a collective-permute: the longest path, over one link of each axis."""
        longest = 0.0
        for source, target in pairs:
            a, b = self.places[source], self.places[target]
            if a[0] != b[0]:
                longest = max(longest, size / self.chip.dcn)
                continue
            hops = 0
            for x, y, length, wrap in zip(a[1:], b[1:], self.tpu.shape, self.tpu.wrap, strict=True):
                distance = abs(x - y)
                hops += min(distance, length - distance) if wrap else distance
            longest = max(longest, hops * (size / self.chip.link + HOP))
        return longest


class Estimator:
    """Walks a scheduled module as the device would."""

    def __init__(self, module: hlo.Module, network: Network, uncounted: int | None = None):
        """`uncounted`: assumed trip count of a loop whose end depends on data; None: such a loop is an error."""
        self.module, self.network, self.chip, self.uncounted = module, network, network.chip, uncounted
        self._finished: dict[str, Cost] = {}
        self._received: dict[str, str] = {}  # name of a `recv` -> its transfer
        self._prepared: dict[str, tuple[str, Traffic]] = {}  # name of an `async-start` without operands

    def run(self) -> Cost:
        """The cost of one step."""
        return self._computation(self.module.entry)

    def _computation(self, name: str) -> Cost:
        """Issues the instructions in order.

        Started collectives run one after the other beside the computation, and so do copies to and from the host on
        their own link. An instruction that needs the result waits for it.
        """
        if name in self._finished:
            return self._finished[name]
        cost = Cost()
        busy: dict[str, float] = collections.defaultdict(float)  # link -> when it is free again
        pending: dict[str, tuple[float, str]] = {}
        for instr in self.module.computations[name].values():
            stage, key, kind, wire = self._communication(instr)
            link = HOST if kind == HOST else BETWEEN if kind.endswith(BETWEEN) else "network"
            if stage == "start":
                busy[link] = max(busy[link], cost.seconds) + wire.seconds
                pending[key] = (busy[link], kind)
                cost.traffic[kind].add(wire)
            elif stage == "done" and key in pending:
                ready, kind = pending.pop(key)
                cost.traffic[kind].exposed += max(0.0, ready - cost.seconds)
                cost.seconds = max(cost.seconds, ready)
            elif stage == "whole":
                # A collective in a fusion runs beside the fusion's own computation. It delays what was started before
                # on the same links.
                compute = self._compute(instr, cost)
                busy[link] = max(busy[link], cost.seconds - compute) + wire.seconds
                wire.exposed = max(0.0, wire.seconds - compute)
                cost.seconds += wire.exposed
                cost.traffic[kind].add(wire)
            elif instr.opcode == "while":
                cost.add(self._computation(instr.attribute("body")), self._trips(name, instr))
            elif instr.opcode == "call":
                cost.add(self._computation(instr.called[0]))
            elif instr.opcode == "conditional":
                branches = [self._computation(branch) for branch in instr.called]
                cost.add(max(branches, key=lambda branch: branch.seconds, default=Cost()))
            else:
                self._compute(instr, cost)
        self._finished[name] = cost
        return cost

    def _trips(self, computation: str, loop: hlo.Instruction) -> int:
        try:
            return hlo.trip_count(self.module, computation, loop)
        except ValueError:
            if self.uncounted is None:
                raise
            return self.uncounted

    def _compute(self, instr: hlo.Instruction, cost: Cost) -> float:
        """Adds a computing instruction; returns its seconds."""
        kernel = kernels.cycles(instr, self.chip)
        grouped = kernels.grouped_cycles(instr, self.chip, self.module.inside(instr))
        unknown = instr.cycles is None or (instr.is_kernel and not instr.cycles)
        cost.unestimated += unknown and kernel is None and grouped is None
        counted = grouped or kernel or instr.cycles or 0
        seconds = counted / self.chip.clock
        if not seconds:
            return 0.0
        opcodes = {instr.opcode, *(inner.opcode for inner in self.module.inside(instr))}
        matmul = grouped is not None or opcodes & {"convolution", "dot"}
        cost.seconds += seconds
        cost.compute[ATTENTION if kernel is not None else MATMUL if matmul else OTHER] += seconds
        return seconds

    def _communication(self, instr: hlo.Instruction) -> tuple[str, str, str, Traffic]:
        """(stage, key, kind, traffic) of an instruction; stage "" if it does not communicate.

        Inside a slice there are four forms: plain; a pair of `-start` and `-done`; on v5e fusions that start a
        collective, continue it beside their own computation, and end it, all with the same channel; and for
        SparseCores an `async-start` without operands, which prepares them, an `async-update` with the operands, and an
        `async-done`. Between slices the hosts transfer: a `send` and a `recv` with the same rendezvous; the `-done` of
        the latter waits.
        """
        nothing = "", "", "", Traffic()
        rendezvous = hlo.between_slices(instr)
        if instr.opcode == "recv" and rendezvous:
            self._received[instr.name] = rendezvous
            return nothing
        if instr.opcode == "send" and rendezvous:
            return "start", rendezvous, *self._sent(instr)
        if instr.opcode.endswith("-done"):
            return "done", self._received.get(instr.operands[0], instr.operands[0]), "", Traffic()
        if instr.opcode == "async-update" and instr.operands[0] in self._prepared:
            return "start", instr.name, *self._prepared[instr.operands[0]]
        moved = hlo.host_transfer_bytes(instr)
        if moved:
            return "start", instr.name, HOST, Traffic(count=1, bytes=moved, seconds=moved / self.chip.host)
        inner = next(self._collectives(instr), None)
        if inner is None:
            return nothing
        kind, wire = self._wire(instr, inner)
        if instr.opcode == "async-start" and not instr.operands:
            self._prepared[instr.name] = kind, wire
            return nothing
        if instr.opcode.endswith("-start"):
            return "start", instr.name, kind, wire
        if instr.name.startswith("async-collective-start"):
            return "start", inner.attribute("channel_id"), kind, wire
        if instr.name.startswith("async-collective-done"):
            return "done", inner.attribute("channel_id"), kind, Traffic()
        if any(name.startswith("async_collective_fusion") for name in instr.called):
            return nothing  # continues what was started
        return "whole", "", kind, wire

    def _collectives(self, instr: hlo.Instruction) -> Iterator[hlo.Instruction]:
        """The instruction itself if it is a collective, else those inside a fusion or an `async-start`."""
        if _kind(instr):
            yield instr
        elif instr.opcode in ("fusion", "async-start"):
            yield from (inner for inner in self.module.inside(instr) if _kind(inner))

    def _sent(self, instr: hlo.Instruction) -> tuple[str, Traffic]:
        """(kind, traffic) of a `send` to the other slices; of an all-reduce each device sends and gets its share."""
        kind = instr.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
        dtype, sizes = hlo.shapes(instr.shape)[0]
        moved = hlo.bytes_of(dtype) * math.prod(sizes)
        slices = self.network.tpu.slices
        passes = 2 if kind == "all-reduce" else 1
        seconds = passes * moved * (slices - 1) / slices / self.chip.dcn
        return kind + BETWEEN, Traffic(count=1, bytes=moved, seconds=seconds)

    def _wire(self, instr: hlo.Instruction, collective: hlo.Instruction) -> tuple[str, Traffic]:
        """(kind, traffic) of the collective in an instruction."""
        kind = _kind(collective)
        size: float = hlo.num_bytes(collective.shape)
        started = collective.opcode.endswith("-start")  # the shape is then (operand, result)
        if kind == "collective-permute":
            size = size / 2 if started else size
            pairs = hlo.pairs(collective.attributes)
            leaves = any(self.network.leaves_slice(pair) for pair in pairs)
            seconds = self.network.transfer(pairs, size)
        else:
            group = hlo.group(collective.attributes, len(self.network.places))
            leaves = self.network.leaves_slice(group)
            if collective.opcode == "all-gather-start":
                size = size * len(group) / (len(group) + 1)
            elif started:
                size /= 2
            elif kind == "reduce-scatter":
                size *= len(group)
            # TPU's reduce-scatter is a fusion of an all-reduce and the slice that each device keeps. On the wire it is
            # no all-reduce: docs/planner_details.md has a measured figure.
            if any(name.startswith("all-reduce-scatter") for name in instr.called):
                kind = "reduce-scatter"
            seconds = self.network.seconds(kind, group, size)
        return kind + (BETWEEN if leaves else ""), Traffic(count=1, bytes=size, seconds=seconds)


def _kind(instr: hlo.Instruction) -> str:
    """The kind of collective of an instruction, or ""."""
    kind = instr.opcode.removesuffix("-start")
    return kind if kind in hlo.COLLECTIVES else ""
