"""Reads the text of a scheduled, optimized HLO module: what runs, how often, and what moves.

Only what the cost model needs is taken from each instruction. The text format is XLA's
(https://openxla.org/xla/operation_semantics). The cycles are the TPU compiler's own estimates from `backend_config`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
# A dtype has its bits in its name, after which a float may say how they are divided (f8e4m3fn).
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|f\d+e\d+m\d+\w*|c64|c128)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_HOST_ARRAY = re.compile(r"\b\w+\[[\d,]*\]\{[^}]*S\(5\)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1  # the compiler writes it where it has none
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_NAMES = re.compile(r"%([\w.\-]+)")
_ELEMENT = re.compile(r"%([\w.\-]+)((?:#\d+)+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction.

    Attributes:
      shape: text of the result's shape, with layouts.
      arguments: text between the parentheses: operands, or the value of a constant.
      attributes: text after the operands.
      root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shape: str
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_NAMES.findall(self.arguments))

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate for one execution: 0 if it gives none, None if it says that it has none."""
        counts = [int(count) for count in _CYCLES.findall(self.attributes)]
        return None if _NO_ESTIMATE in counts else sum(counts)

    @property
    def is_kernel(self) -> bool:
        """Whether this is a Pallas kernel, whose cycles the compiler does not estimate."""
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.attributes

    @property
    def op_name(self) -> str:
        """The place in the Python program, as JAX's name stack."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of called computations, except the body and the condition of a loop."""
        matches = _CALLED.findall(self.attributes)
        return tuple(name.strip().lstrip("%") for group in matches for name in group.strip("{}").split(","))

    def attribute(self, key: str) -> str:
        """The value of `key=value`, a name or a number; "" if absent."""
        match = re.search(rf"\b{key}=%?([\w.\-\"]+)", self.attributes)
        return match[1].strip('"') if match else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """The computations by name, each its instructions by name in issue order, and the name of the entry computation."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def root(self, computation: str) -> Instruction:
        return next(instr for instr in self.computations[computation].values() if instr.root)

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of all computations that it calls, recursively."""
        for name in instruction.called:
            for instr in self.computations.get(name, {}).values():
                yield instr
                yield from self.inside(instr)


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, pending = "", None, ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        starts = _NAME.match(line)
        if pending and (starts or header or line == "}"):
            each = _instruction(pending)
            current[each.name] = each
            pending = ""
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif starts and current is not None:
            pending = line
        elif pending:
            pending += line  # some attributes, such as a kernel's metadata, span lines
    if not entry:
        raise ValueError("the HLO text has no entry computation")
    return Module(
        computations={name: _named_elements(body) for name, body in computations.items()}, entry=entry
    )


def _named_elements(body: dict[str, Instruction]) -> dict[str, Instruction]:
    """A computation in which an element of a tuple is an instruction of its own: JAX 0.12 writes `%tuple#1` instead."""
    if not any("#" in instr.arguments for instr in body.values()):
        return body
    result: dict[str, Instruction] = {}
    for instr in body.values():
        arguments = instr.arguments
        for name, indices in _ELEMENT.findall(arguments):
            element = result[name]
            for index in indices[1:].split("#"):
                element_name = f"{element.name}.element.{index}"
                if element_name not in result:
                    result[element_name] = Instruction(
                        name=element_name, opcode="get-tuple-element", shape=_elements(element.shape)[int(index)],
                        arguments=f"%{element.name}", attributes=f", index={index}", root=False,
                    )  # fmt: skip
                element = result[element_name]
            arguments = arguments.replace(f"%{name}{indices}", f"%{element.name}", 1)
        result[instr.name] = dataclasses.replace(instr, arguments=arguments)
    return result


def _elements(shape: str) -> list[str]:
    """The shapes of a tuple's elements, as text."""
    elements, depth = [""], 0
    for each in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += (each in "({[") - (each in ")}]")
        if each == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += each
    return [each.strip() for each in elements]


def _instruction(text: str) -> Instruction:
    name = _NAME.match(text)
    rest = text[name.end() :]
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.search(rest, shape_end)
    end = _closing(rest, opcode.end() - 1)
    return Instruction(
        name=name[2],
        opcode=opcode[1],
        shape=rest[:shape_end],
        arguments=rest[opcode.end() : end],
        attributes=rest[end + 1 :],
        root=bool(name[1]),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of each array in a shape's text."""
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(text)
    ]


def bytes_of(dtype: str) -> float:
    """Bytes of an element, e.g. 0.5 of "s4"."""
    bits = _BITS.search(dtype)
    return int(bits[0]) / 8 if bits else 1  # a predicate has none


def num_bytes(text: str) -> int:
    """Bytes of all arrays in a shape's text, without padding."""
    return int(sum(bytes_of(dtype) * math.prod(sizes) for dtype, sizes in shapes(text)))


def host_transfer_bytes(each: Instruction) -> int:
    """Bytes between device and host that an asynchronous copy, slice or update starts to move; else 0.

    The spellings differ by generation and by loop (`copy-start`, `dynamic-slice-start`, `async-start` around a slice
    or an update). All name both arrays: the layout of that in host memory ends with S(5), the other one is what moves.
    Scalars of the shape are indices and handles.
    """
    if not each.opcode.endswith("-start") or "S(5)" not in each.shape:
        return 0
    return int(
        sum(bytes_of(dtype) * math.prod(sizes) for dtype, sizes in shapes(on_device(each.shape)) if sizes)
    )


def on_device(text: str) -> str:
    """The text of a shape without the arrays in host memory."""
    return _HOST_ARRAY.sub("", text)


def between_slices(each: Instruction) -> str:
    """The name that a `send` to other slices shares with its `recv`; "" of other instructions."""
    if each.opcode not in ("send", "recv") or "xla_megascale_runtime" not in each.attributes:
        return ""
    return each.attribute("_xla_host_transfer_rendezvous")


def trip_count(module: Module, computation: str, loop: Instruction) -> int:
    """How often a `while` in `computation` runs its body: JAX counts an element of its tuple up to a constant.

    Raises:
      ValueError: the loop is of another kind.
    """
    condition = loop.attribute("condition")
    test = module.root(condition)
    if test.opcode != "compare":  # `and` with a constant true, or a fusion of the comparison
        test = next((instr for instr in module.inside(test) if instr.opcode == "compare"), test)
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        raise ValueError(f"cannot count the trips of {loop.name}: its condition is {test.opcode}")
    initial = module.computations[computation][loop.operands[0]]
    bounds = []
    for name in test.operands:
        element = module.computations[condition].get(name)
        if element is not None and element.opcode == "get-tuple-element":
            index = int(element.attribute("index"))
            bounds.append((_constant(module, computation, initial.operands[index]), index))
        else:
            bounds.append((_constant(module, condition, name), -1))
    (start, index), (stop, _) = bounds
    if start is None or stop is None:
        raise ValueError(f"cannot count the trips of {loop.name}: its bounds are not constant")
    return max(0, -(-(stop - start) // _increment(module, loop.attribute("body"), index)))


def _source(module: Module, computation: str, name: str) -> Instruction | None:
    """The instruction that makes a value, through copies."""
    body = module.computations[computation]
    instr = body.get(name)
    while instr is not None and instr.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instr = body.get(instr.operands[0])
    return instr


def _constant(module: Module, computation: str, name: str) -> int | None:
    """The value of a scalar constant; None if it is none."""
    instr = _source(module, computation, name)
    return int(instr.arguments) if instr is not None and instr.opcode == "constant" else None


def _increment(module: Module, body: str, index: int) -> int:
    """By how much the body of a loop raises element `index` of the carried tuple."""
    root = module.root(body)
    instr = _source(module, body, root.operands[index]) if root.opcode == "tuple" else None
    terms = instr.operands if instr is not None and instr.opcode == "add" else ()
    constants = (_constant(module, body, name) for name in terms)
    return next((value for value in constants if value is not None), 1)


def group(attributes: str, devices: int) -> list[int]:
    """The first group of a collective, as positions in the device assignment.

    XLA writes groups in three ways: as lists, as iota tiles and as mesh axes.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return _integers(listed[1])
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled:
        shape, source = _integers(tiled[1]), _integers(tiled[2])
        order = _integers(tiled[3]) if tiled[3] else range(len(source))
        return _spread([(source[axis], math.prod(source[axis + 1 :])) for axis in order])[: shape[-1]]
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?\s*\{([^}]*)\}", attributes
    )
    if meshed:
        axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", meshed[1])]
        strides = {
            name: math.prod(size for _, size in axes[index + 1 :]) for index, (name, _) in enumerate(axes)
        }
        chosen = []  # an axis may be split: 'axis':(pre_size)size
        for name, pre_size, sub_size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", meshed[4]):
            size = dict(axes)[name]
            count = int(sub_size or size)
            chosen.append((count, strides[name] * (size // (int(pre_size) * count) if sub_size else 1)))
        return _spread(chosen)
    return list(range(devices))


def _integers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _spread(axes: Iterable[tuple[int, int]]) -> list[int]:
    """Positions of a grid with these (size, stride) axes, in row-major order."""
    flat = [0]
    for size, stride in axes:
        flat = [base + step * stride for base in flat for step in range(size)]
    return flat


def pairs(attributes: str) -> list[tuple[int, int]]:
    """Source and target of each transfer of a collective-permute."""
    match = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", match[0])] if match else []
