"""The reader of HLO text on a small module with every form that matters, written by hand."""

import re

import pytest

from lemur_jax.plan import hlo

MODULE = """%body.1 (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %fusion.1 = bf16[4,8]{1,0} fusion(%x), calls=%fused.1, metadata={op_name="jit(f)/dot"}, backend_config={"x":{"estimated_cycles":"1000"}}
  ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%next, %fusion.1)
}

%fused.1 (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %dot = bf16[4,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%cond.1 (arg: (s32[], bf16[4,8])) -> pred[] {
  %stop = s32[]{:T(128)} constant(9)
  %arg.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %stop), direction=LT
}

ENTRY %main (q: bf16[4,8]) -> bf16[4,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %init = (s32[]{:T(128)}, /*index=1*/bf16[4,8]{1,0}) tuple(%start, %q)
  %while.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%init), condition=%cond.1, body=%body.1
  %kernel = bf16[4,8]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a":"b"
}}, backend_config={"estimated_cycles":"7"}
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(MODULE)


def test_instructions(module):
    assert module.entry == "main"
    body = module.computations["body.1"]
    fusion = body["fusion.1"]
    assert (fusion.opcode, fusion.cycles, fusion.operands) == ("fusion", 1000, ("x",))
    assert fusion.op_name == "jit(f)/dot"
    assert [each.opcode for each in module.inside(fusion)] == ["parameter", "convolution"]
    assert body["t"].root
    assert not fusion.root
    kernel = module.computations["main"]["kernel"]  # over several lines
    assert kernel.cycles == 7
    assert '"a":"b"' in kernel.attributes


def test_elements_of_tuples_without_a_name(module):
    """JAX 0.12 writes `%arg#0` in place of an instruction that takes element 0 of `arg`."""
    text = "\n".join(line for line in MODULE.splitlines() if not re.match(r"  %[ijx] = .*get-tuple", line))
    for name, element in (("i", "arg#0"), ("x", "arg#1"), ("j", "arg.2#0")):
        text = re.sub(rf"%{name}\b", f"%{element}", text)
    assert "#1), calls=%fused.1" in text
    short = hlo.parse(text)
    for each in (module, short):
        assert hlo.trip_count(each, "main", each.computations["main"]["while.1"]) == 4  # 1, 3, 5, 7
    (name,) = short.computations["body.1"]["fusion.1"].operands
    element, known = short.computations["body.1"][name], module.computations["body.1"]["x"]
    assert (element.opcode, element.shape, element.operands) == (known.opcode, known.shape, known.operands)
    assert element.attribute("index") == "1"
    assert [each.opcode for each in short.computations["body.1"].values()].count("get-tuple-element") == 2


def test_a_trip_that_begins_before_the_bound_counts():
    module = hlo.parse(MODULE.replace("constant(9)", "constant(10)"))
    assert hlo.trip_count(module, "main", module.computations["main"]["while.1"]) == 5  # 1, 3, 5, 7, 9


def test_unknown_loop_is_an_error_rather_than_a_guess():
    module = hlo.parse(MODULE.replace("direction=LT", "direction=NE"))
    with pytest.raises(ValueError, match=r"cannot count the trips of while\.1"):
        hlo.trip_count(module, "main", module.computations["main"]["while.1"])


def test_sizes(module):
    assert hlo.num_bytes("(bf16[2,3]{1,0:T(8,128)}, f32[]{:T(128)}, pred[5])") == 12 + 4 + 5
    assert hlo.num_bytes("(f8e4m3fn[2,3]{1,0}, f8e5m2[7], s4[6], c64[2])") == 6 + 7 + 3 + 16
    assert hlo.pairs("source_target_pairs={{0,1},{1,2},{2,0}}, x") == [(0, 1), (1, 2), (2, 0)]
    shape = "(s32[], bf16[80,4]{1,0:T(8,128)(2,1)S(5)}, bf16[80,8]{1,0:T(8,128)})"
    assert hlo.shapes(hlo.on_device(shape)) == [("s32", ()), ("bf16", (80, 8))]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}", [0, 2, 4]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}, x", [0, 1]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups(text, group):
    assert hlo.group(text, 8) == group


# From dumps of libtpu 0.0.52, layouts shortened. Every generation writes the third and the fourth in its loops over
# layers; where the loop is peeled or unrolled (v5e, v5p, v6e, tpu7x), the first two and the third stand in the entry.
_OUT = "((bf16[4,2,64,8]{3,2,1,0:S(5)}, bf16[1,2,64,8]{3,2,1,0}, s32[], s32[]), bf16[4,2,64,8]{3,2,1,0:S(5)}, u32[]{:S(2)})"
_IN = "((bf16[4,2,64,8]{3,2,1,0:T(8,128)(2,1)S(5)}, s32[], s32[]), bf16[1,2,64,8]{3,2,1,0}, u32[]{:S(2)})"


@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        ("(bf16[64]{0:T(8)S(5)}, bf16[64]{0:T(8)}, u32[]{:S(2)}) copy-start(%q)", 128),
        ("(bf16[64]{0:T(8)}, bf16[64]{0:T(8)S(5)}, u32[]{:S(2)}) copy-start(%copy-done)", 128),
        (f"{_OUT} async-start(%host, %update, %i, %i), calls=%async_computation.7", 2048),
        (f"{_IN} async-start(%host, %i, %i), calls=%async_computation.8", 2048),
        (f"{_IN} dynamic-slice-start(%host, %i, %i)", 2048),
        (f"{_OUT} dynamic-update-slice-start(%host, %update, %i, %i)", 2048),
        ("bf16[4,2,64,8]{3,2,1,0:T(8,128)(2,1)S(5)} async-done(%start)", 0),
        ('bf16[4,2,64,8]{3,2,1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"', 0),
        ("((bf16[2,8]{1,0}), bf16[1,8]{1,0:S(3)}, u32[]) async-start(%q), calls=%async_computation.15", 0),
    ],
)
def test_transfers_between_device_and_host(instruction, moved):
    module = hlo.parse(f"ENTRY %main (q: bf16[64]) -> bf16[64] {{\n  ROOT %x = {instruction}\n}}\n")
    assert hlo.host_transfer_bytes(module.computations["main"]["x"]) == moved
