"""Estimates how long a compiled step takes on the slice that it was compiled for.

Nothing here is measured. Computation: the compiler's own cycle counts, each loop body as often as the
loop turns. Collectives: bytes over the links that the group spans. Attention kernels: a model
fitted to the compiler's static schedules of them (plan/kernels.py). docs/planner.md says more.
"""

import collections
import dataclasses
import math

from lemur_jax.plan import hlo, kernels
from lemur_jax.plan.topologies import Slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Speeds of one device.

    Attributes:
      clock: cycles a second of the cycle counts: peak FLOP/s over FLOPs a cycle of the matrix units.
      link: bytes a second of one link in one direction: the published bandwidth less a tenth of overhead.
      dcn: bytes a second between slices, a device: its share of the host's network cards (assumed).
      host: bytes a second between the chip and its host's memory (assumed: PCIe 3.0 x16 at four fifths).
      hbm: bytes that a program may use, as the compiler reports.
      bandwidth: bytes a second between the HBM and the device, as published.
    """

    clock: float
    link: float
    dcn: float
    hbm: int
    bandwidth: float
    host: float = 12e9


_GIB = 2**30
CHIPS: dict[str, Chip] = {
    "v4": Chip(clock=1.05e9, link=45e9, dcn=6.25e9, hbm=int(30.75 * _GIB), bandwidth=1228e9),
    "v5e": Chip(clock=1.5e9, link=45e9, dcn=3.125e9, hbm=int(15.75 * _GIB), bandwidth=819e9),
    "v5p": Chip(clock=1.75e9, link=90e9, dcn=6.25e9, hbm=int(95.74 * _GIB), bandwidth=2765e9),
    "v6e": Chip(clock=1.75e9, link=90e9, dcn=12.5e9, hbm=int(31.24 * _GIB), bandwidth=1638e9),
    "tpu7x": Chip(clock=2.2e9, link=90e9, dcn=12.5e9, hbm=int(94.74 * _GIB), bandwidth=3690e9),
}
# Seconds for a message to pass one chip.
HOP = 1e-6

# Buckets of the report.
MATMUL, ATTENTION, OTHER = "matmul", "attention kernels", "other compute"
HOST = "host transfer"
# Added to the name of a collective that crosses the data-centre network.
BETWEEN = ", slices"


@dataclasses.dataclass(kw_only=True)
class Traffic:
    """What one kind of collective does in a step.

    Attributes:
      count: executions.
      bytes: moved by each device, as written in the program.
      seconds: on the wire.
      exposed: seconds of them in which the device computes nothing.
    """

    count: float = 0
    bytes: float = 0
    seconds: float = 0
    exposed: float = 0

    def add(self, other: "Traffic", times: float = 1) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


@dataclasses.dataclass(kw_only=True)
class Cost:
    """Estimated seconds of a program or of a part of it.

    Attributes:
      seconds: from start to end.
      compute: seconds by bucket.
      traffic: by "kind over axes", e.g. "all-gather".
      largest: (seconds in all, instruction, where it comes from), computing instructions.
    """

    seconds: float = 0
    compute: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    traffic: dict[str, Traffic] = dataclasses.field(default_factory=lambda: collections.defaultdict(Traffic))
    largest: list[tuple[float, str, str]] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds `times` executions of `other`, one after the other."""
        self.seconds += times * other.seconds
        for bucket, seconds in other.compute.items():
            self.compute[bucket] += times * seconds
        for kind, traffic in other.traffic.items():
            self.traffic[kind].add(traffic, times)
        self.largest += [(times * seconds, name, where) for seconds, name, where in other.largest]

    @property
    def exposed(self) -> float:
        """Seconds in which the device waits for the network."""
        return sum(traffic.exposed for traffic in self.traffic.values())


class Network:
    """Time on the wire of a collective on a slice.

    Bandwidth is taken as if every ring of the group carried its share at full speed: an axis that is closed
    has two links a chip, an open one or one of two chips only one.
    """

    def __init__(self, tpu: Slice, places: list[tuple[int, ...]]):
        """`places`: (slice, x, y, ...) of each device in the order of the device assignment."""
        self.tpu = tpu
        self.chip = CHIPS[tpu.generation.name]
        self.places = places

    def slice_of(self, device: int) -> int:
        return self.places[device][0]

    def _axes(self, group: list[int]) -> tuple[list[tuple[int, int]], int]:
        """[(chips, links)] for each torus axis that the group spans, and the slices that it spans."""
        coordinates = list(zip(*(self.places[device] for device in group), strict=True))
        spans = [len(set(values)) for values in coordinates]
        axes = []
        for span, size, wrap in zip(spans[1:], self.tpu.shape, self.tpu.wrap, strict=False):
            if span > 1:
                axes.append((span, 2 if wrap and span == size and size > 2 else 1))
        return axes, spans[0]

    def seconds(self, kind: str, group: list[int], size: float) -> float:
        """Seconds of one execution.

        Args:
          kind: opcode without -start.
          group: devices that take part.
          size: bytes a device: of the whole result for an all-gather, else of the operand.
        """
        ways = len(group)
        if ways == 1 or not size:
            return 0.0
        axes, slices = self._axes(group)
        passes = 2 if kind == "all-reduce" else 1
        inside = ways // slices
        links = sum(count for _, count in axes) or 1
        hops = sum(span / 2 if count == 2 else span - 1 for span, count in axes)
        if kind in ("all-to-all", "ragged-all-to-all"):
            distance = sum(span / 4 if count == 2 else span / 3 for span, count in axes)
            seconds = size / ways * (ways - 1) * distance / (links * self.chip.link)
        else:
            seconds = passes * size * (inside - 1) / inside / (links * self.chip.link)
        if slices > 1:  # between slices each device sends its own share
            seconds += passes * size / inside * (slices - 1) / slices / self.chip.dcn
        return seconds + passes * hops * HOP

    def transfer(self, pairs: list[tuple[int, int]], size: float) -> float:
        """Seconds of a collective-permute: the longest way, over one link of each axis."""
        longest = 0.0
        for source, target in pairs:
            a, b = self.places[source], self.places[target]
            if a[0] != b[0]:
                longest = max(longest, size / self.chip.dcn)
                continue
            hops = 0
            for x, y, length, wrap in zip(a[1:], b[1:], self.tpu.shape, self.tpu.wrap, strict=False):
                distance = abs(x - y)
                hops += min(distance, length - distance) if wrap else distance
            longest = max(longest, hops * (size / self.chip.link + HOP))
        return longest


class Estimator:
    """Walks a scheduled module the way the device would."""

    def __init__(self, module: hlo.Module, network: Network, uncounted: int | None = None):
        """`uncounted`: turns of a loop whose end depends on data; None: such a loop is an error."""
        self.uncounted = uncounted
        self.module = module
        self.network = network
        self.chip = network.chip
        self._done: dict[str, Cost] = {}
        self._received: dict[str, str] = {}  # name of a `recv` -> the transfer that it belongs to

    def run(self) -> Cost:
        """The cost of one step."""
        cost = self._computation(self.module.entry)
        totals: dict[tuple[str, str], float] = collections.defaultdict(float)
        for seconds, name, where in cost.largest:
            totals[name, where] += seconds
        cost.largest = sorted(((s, *key) for key, s in totals.items()), reverse=True)[:20]
        return cost

    def _computation(self, name: str) -> Cost:
        """Issues the instructions in order.

        Collectives that were started run one after the other beside the computation, and so do copies to and
        from the host on their own link; whoever asks for the result waits until it is there.
        """
        if name in self._done:
            return self._done[name]
        cost = Cost()
        busy: dict[str, float] = collections.defaultdict(float)  # until when the links are
        pending: dict[str, tuple[float, str]] = {}
        for each in self.module.computations[name]:
            stage, key, kind, wire = self._communication(each)
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
                # Inside a fusion the collective runs beside the fusion's own computation. What was started before
                # shares the links with it and ends that much later.
                compute = self._compute(each, cost)
                busy[link] = max(busy[link], cost.seconds - compute) + wire.seconds
                wire.exposed = max(0.0, wire.seconds - compute)
                cost.seconds += wire.exposed
                cost.traffic[kind].add(wire)
            elif each.opcode == "while":
                cost.add(self._computation(self.module.body(each)), self._trips(name, each))
            elif each.opcode == "call":
                cost.add(self._computation(each.called[0]))
            elif each.opcode == "conditional":
                branches = [self._computation(branch) for branch in each.called]
                cost.add(max(branches, key=lambda branch: branch.seconds, default=Cost()))
            else:
                self._compute(each, cost)
        self._done[name] = cost
        return cost

    def _trips(self, computation: str, loop: hlo.Instruction) -> int:
        try:
            return hlo.trip_count(self.module, computation, loop)
        except ValueError:
            if self.uncounted is None:
                raise
            return self.uncounted

    def _compute(self, each: hlo.Instruction, cost: Cost) -> float:
        """Adds a computing instruction; returns its seconds."""
        kernel = kernels.cycles(each, self.network.tpu.generation)
        cycles = each.cycles if kernel is None else kernel
        if not cycles:
            return 0.0
        if kernel is not None:
            bucket = ATTENTION
        else:
            inner = {each.opcode, *(one.opcode for one in self.module.inside(each))}
            bucket = MATMUL if inner & {"convolution", "dot"} else OTHER
        seconds = cycles / self.chip.clock
        cost.seconds += seconds
        cost.compute[bucket] += seconds
        cost.largest.append((seconds, each.name, each.op_name))
        return seconds

    def _communication(self, each: hlo.Instruction) -> tuple[str, str, str, Traffic]:
        """(stage, key, kind, traffic) of an instruction; stage "" if it does not communicate.

        Three forms inside a slice: plain; a pair of `-start` and `-done`; and on v5e fusions that begin a collective,
        carry it on beside their own computation, and end it. Those name it in each part, by its channel. Between
        slices the hosts carry it: a `send`, and a `recv` with the same rendezvous, whose `-done` waits.
        """
        meeting = hlo.between_slices(each)
        if each.opcode == "recv" and meeting:
            self._received[each.name] = meeting
            return "", "", "", Traffic()
        if each.opcode == "send" and meeting:
            return "start", meeting, *self._sent(each)
        if each.opcode.endswith("-done"):
            return "done", self._received.get(each.operands[0], each.operands[0]), "", Traffic()
        moved = hlo.host_transfer_bytes(each)
        if moved:
            return "start", each.name, HOST, Traffic(count=1, bytes=moved, seconds=moved / self.chip.host)
        inner = next((one for one in self._candidates(each) if _kind(one)), None)
        if inner is None:
            return "", "", "", Traffic()
        kind = "reduce-scatter" if _keeps_a_slice(each) else _kind(inner)
        kind, wire = self._label(inner, kind), self._wire(inner, kind)
        if each.opcode.endswith("-start"):
            return "start", each.name, kind, wire
        if each.name.startswith("async-collective-start"):
            return "start", inner.attribute("channel_id"), kind, wire
        if each.name.startswith("async-collective-done"):
            return "done", inner.attribute("channel_id"), kind, Traffic()
        if any(name.startswith("async_collective_fusion") for name in each.called):
            return "", "", "", Traffic()  # carries on what was started
        return "whole", "", kind, wire

    def _candidates(self, each: hlo.Instruction):
        return (
            [each]
            if _kind(each)
            else self.module.inside(each)
            if each.opcode in ("fusion", "async-start")
            else []
        )

    def _sent(self, each: hlo.Instruction) -> tuple[str, Traffic]:
        """What a `send` to the other slices moves; of an all-reduce each device gives away and takes its share."""
        kind = each.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
        dtype, sizes = hlo.shapes(each.shape)[0]
        moved = hlo.BYTES[dtype] * math.prod(sizes)
        slices = self.network.tpu.slices
        passes = 2 if kind == "all-reduce" else 1
        seconds = passes * moved * (slices - 1) / slices / self.chip.dcn
        return kind + BETWEEN, Traffic(count=1, bytes=moved, seconds=seconds)

    def _label(self, each: hlo.Instruction, kind: str) -> str:
        """The kind of a collective, and whether it leaves the slice."""
        if kind == "collective-permute":
            pairs = hlo.pairs(each.attributes)
            leaves = any(self.network.slice_of(a) != self.network.slice_of(b) for a, b in pairs)
        else:
            group = hlo.group(each.attributes, len(self.network.places))
            leaves = len({self.network.slice_of(device) for device in group}) > 1
        return kind + (BETWEEN if leaves else "")

    def _wire(self, each: hlo.Instruction, kind: str) -> Traffic:
        if kind == "collective-permute":
            size = hlo.num_bytes(each.shape) / (2 if each.opcode.endswith("-start") else 1)
            return Traffic(
                count=1, bytes=size, seconds=self.network.transfer(hlo.pairs(each.attributes), size)
            )
        group = hlo.group(each.attributes, len(self.network.places))
        size = hlo.num_bytes(each.shape)
        if each.opcode == "all-gather-start":  # its shape is (operand, result)
            size = size * len(group) / (len(group) + 1)
        elif each.opcode.endswith("-start"):
            size /= 2
        elif _kind(each) == "reduce-scatter":
            size *= len(group)
        return Traffic(count=1, bytes=size, seconds=self.network.seconds(kind, group, size))


def _kind(each: hlo.Instruction) -> str:
    """The collective that an instruction is, or ""."""
    kind = each.opcode.removesuffix("-start")
    return kind if kind in hlo.COLLECTIVES else ""


def _keeps_a_slice(each: hlo.Instruction) -> bool:
    """Whether this is TPU's reduce-scatter: a fusion of an all-reduce and the slice that each device keeps of it.

    On the wire it is no all-reduce: docs/planner.md has a figure of one that was measured.
    """
    return any(name.startswith("all-reduce-scatter") for name in each.called)


def places(devices, tpu: Slice) -> list[tuple[int, ...]]:
    """(slice, x, y, ...) of each device."""
    return [
        (getattr(device, "slice_index", None) or 0, *device.coords[: len(tpu.shape)]) for device in devices
    ]
