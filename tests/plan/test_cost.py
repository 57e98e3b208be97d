"""The cost model on numbers that can be worked out by hand."""

import dataclasses
import itertools
import types

import pytest

from lemur_jax.plan import cost, hlo, kernels, topologies


def network(name, slices=1):
    tpu = topologies.find_slice(name, slices)
    places = itertools.product(range(slices), *(range(size) for size in tpu.shape))
    return cost.Network(
        tpu, [types.SimpleNamespace(slice_index=first, coords=rest) for first, *rest in places]
    )


@pytest.mark.parametrize(
    ("name", "kind", "ways", "seconds"),
    [
        ("v4-512", "all-gather", 256, 1e9 * 255 / 256 / (6 * 45e9) + 10e-6),  # 4 x 8 x 8, six links, 10 hops
        ("v4-512", "all-reduce", 256, 2 * (1e9 * 255 / 256 / (6 * 45e9) + 10e-6)),
        ("v4-32", "all-gather", 16, 1e9 * 15 / 16 / (3 * 45e9) + 5e-6),  # 2 x 2 x 4, open: one link an axis
        ("v4-512", "reduce-scatter", 8, 1e9 * 7 / 8 / (2 * 45e9) + 4e-6),  # along one axis
        ("v4-512", "all-gather", 1, 0),
        ("v4-512", "all-to-all", 8, 1e9 / 8 * 7 * 2 / (2 * 45e9) + 4e-6),  # two hops on average
    ],
)
def test_time_on_a_torus(name, kind, ways, seconds):
    assert network(name).seconds(kind, list(range(ways)), 1e9) == pytest.approx(seconds)


def test_slices_are_joined_by_the_slow_network():
    net = network("v4-8", slices=2)
    inside = net.seconds("all-reduce", list(range(4)), 1e9)
    both = net.seconds("all-reduce", list(range(8)), 1e9)
    assert both == pytest.approx(inside + 2 * 1e9 / 4 / 2 / 6.25e9)


def test_transfer_takes_the_short_way_round():
    net = network("v4-512")
    assert net.transfer([(0, 7)], 45e9) == pytest.approx(1.0, rel=1e-3)  # 7 is next to 0 on a ring of 8
    assert net.transfer([(0, 4)], 45e9) == pytest.approx(4.0, rel=1e-3)


def module(body, others=""):
    """A module with this body of the entry, and other computations."""
    return hlo.parse(f"{others}\nENTRY %main (q: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def estimate(body, name, slices=1, others="", **options):
    """The cost of such a module on a slice."""
    return cost.Estimator(module(body, others), network(name, slices), **options).run()


CYCLES = 'backend_config={"estimated_cycles":"1050000"}'  # 1 ms on v4
GATHER = "replica_groups=[1,256]<=[256], dimensions={0}"


def test_asynchronous_collective_hides_behind_computation():
    size = 270_000_000 // 2  # bf16: about 1 ms on the wire
    text = f"""  %q = f32[8]{{0}} parameter(0)
  %ag = (bf16[{size // 256}]{{0}}, bf16[{size}]{{0}}) all-gather-start(%q), {GATHER}
  %one = f32[8]{{0}} fusion(%q), kind=kLoop, {CYCLES}
  %done = bf16[{size}]{{0}} all-gather-done(%ag)
  ROOT %two = f32[8]{{0}} fusion(%done), kind=kLoop, {CYCLES}"""
    hidden = estimate(text, "v4-512")
    wire = hidden.traffic["all-gather"].seconds
    assert wire == pytest.approx(1e-3, rel=0.02)
    assert hidden.seconds == pytest.approx(1e-3 + max(1e-3, wire))
    late = estimate(text.replace(CYCLES, "", 1), "v4-512")
    assert late.exposed == pytest.approx(wire)
    assert late.seconds == pytest.approx(wire + 1e-3)
    assert late.seconds == pytest.approx(sum(late.compute.values()) + late.exposed)


@pytest.mark.parametrize(
    "unknown",
    [
        f"fusion(%q), kind=kLoop, {CYCLES.replace('1050000', str(2**63 - 1))}",
        'custom-call(%q), custom_call_target="tpu_custom_call"',  # a kernel
    ],
)
def test_what_has_no_estimate_adds_no_time_and_is_counted(unknown):
    text = f"""  %q = f32[8]{{0}} parameter(0)
  %one = f32[8]{{0}} {unknown}
  ROOT %two = f32[8]{{0}} fusion(%one), kind=kLoop, {CYCLES}"""
    found = estimate(text, "v4-512")
    assert (found.seconds, found.unestimated) == (pytest.approx(1e-3), 1)


@pytest.mark.parametrize(("kind", "elements", "passes"), [("all-reduce", 256, 2), ("reduce-scatter", 1, 1)])
def test_synchronous_collective_is_exposed(kind, elements, passes):
    text = f"""  %q = f32[8]{{0}} parameter(0)
  %one = f32[8]{{0}} fusion(%q), kind=kLoop, {CYCLES}
  ROOT %ar = f32[{elements * 263_672}]{{0}} {kind}(%one), {GATHER}"""
    result = estimate(text, "v4-512")
    assert result.exposed == pytest.approx(passes * 1e-3, rel=0.02)  # 270 MB
    assert result.seconds == pytest.approx(1e-3 + passes * 1e-3, rel=0.02)


def test_of_the_branches_of_a_conditional_the_slower_counts():
    one = f"fusion(%p), kind=kLoop, {CYCLES}"
    called = f"""%fast (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %a = f32[8]{{0}} {one}
}}

%slow (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %b = f32[8]{{0}} {one}
  ROOT %c = f32[8]{{0}} {one}
}}
"""
    body = """  %q = f32[8]{0} parameter(0)
  ROOT %either = f32[8]{0} conditional(%q, %q, %q), branch_computations={%fast, %slow}"""
    assert estimate(body, "v4-8", others=called).seconds == pytest.approx(2e-3)


def test_a_slice_of_an_all_reduce_is_a_reduce_scatter():
    """TPU's form of it: on the wire half of the all-reduce, as measured elsewhere (docs/planner_details.md)."""
    scatter = f"""%all-reduce-scatter.1 (p: f32[67500000]) -> f32[263672] {{
  %p = f32[67500000]{{0}} parameter(0)
  %ar = f32[67500000]{{0}} all-reduce(%p), {GATHER}
  ROOT %slice = f32[263672]{{0}} dynamic-slice(%ar), dynamic_slice_sizes={{263672}}
}}
"""
    body = """  %q = f32[67500000]{0} parameter(0)
  ROOT %f = f32[263672]{0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1"""
    found = estimate(body, "v4-512", others=scatter).traffic
    assert set(found) == {"reduce-scatter"}
    assert found["reduce-scatter"].bytes == 270e6
    assert found["reduce-scatter"].exposed == pytest.approx(1e-3, rel=0.02)


def test_copies_to_the_host_have_their_own_link():
    text = f"""  %q = f32[8]{{0}} parameter(0)
  %out = (f32[3000000]{{0:S(5)}}, f32[3000000]{{0}}, u32[]) copy-start(%q)
  %one = f32[8]{{0}} fusion(%q), kind=kLoop, {CYCLES}
  ROOT %done = f32[3000000]{{0:S(5)}} copy-done(%out)"""
    result = estimate(text, "v4-512")
    assert result.traffic[cost.HOST].seconds == pytest.approx(1e-3, rel=1e-4)  # 12 MB at 12 GB/s
    assert result.seconds == pytest.approx(1e-3, rel=1e-4)


def custom_call(name, shape, operands, more=""):
    attributes = f', custom_call_target="tpu_custom_call", operand_layout_constraints={{{operands}}}, {more}'
    fields = {"opcode": "custom-call", "arguments": "%a", "root": False}
    return hlo.Instruction(name=name, shape=shape, attributes=attributes, **fields)


def kernel(name, outputs, blocks):
    operands = "s8[1,8,8]{2,1,0}, bf16[2,8,8,4096,128]{4,3,2,1,0}, bf16[2,8,4096,128]{3,2,1,0}"
    metadata = f'frontend_attributes={{kernel_metadata={{"xprof_metadata":"{{{blocks}}}"}}'
    return custom_call(name, f"({', '.join(['f32[512,128]'] * outputs)})", operands, metadata)


def test_kernel_cycles_against_the_published_schedules():
    """Static cycles of one batch and head at S 4096 in blocks of 512, summed from the compiler's dumps by others."""
    blocks = r"\"block_q\": 512, \"block_kv\": 512, \"block_kv_compute\": 512"
    forward = kernel("splash_mqa_fwd_segmented_residuals.2", 5, blocks)
    for name, published in (("v4", 41_944), ("v5e", 47_088)):
        cycles = kernels.cycles(forward, topologies.GENERATIONS[name])
        assert cycles / 128 == pytest.approx(published, rel=0.01)
    # Narrow heads are padded to the 128 lanes.
    narrow = dataclasses.replace(forward, attributes=forward.attributes.replace("4096,128]", "4096,64]"))
    assert kernels.cycles(narrow, topologies.GENERATIONS["v5e"]) == cycles
    keys = r"\"block_q_dkv\": 512, \"block_kv_dkv\": 512"
    name = "vmap_vmap_splash_mqa_dkv_segmented_no_residuals__.1"
    v4, v5e = (topologies.GENERATIONS[name] for name in ("v4", "v5e"))
    for outputs in (2, 4):  # of JAX 0.12 and 0.10
        backward, fused = (kernel(name, count, keys) for count in (outputs, outputs * 3 // 2))
        assert kernels.cycles(backward, v5e) / 128 == pytest.approx(72_760, rel=0.01)
        assert kernels.cycles(backward, v4) / 64 == pytest.approx(123_336, rel=0.01)
        assert kernels.cycles(fused, v4) > 1.05 * kernels.cycles(backward, v4)


@pytest.mark.parametrize("right", ["bf16[32,2048,768]{2,1,0}", "bf16[65536,768]{1,0}"])  # or its gradient
def test_grouped_products_take_the_time_of_their_flops(right):
    operands = f"s32[1]{{0}}, s32[33]{{0}}, bf16[65536,2048]{{1,0}}, {right}"
    each = custom_call("ragged-dot-none.5", "bf16[65536,768]{1,0}", operands, "frontend_attributes={}")
    chip = topologies.GENERATIONS["v5p"]
    seconds = kernels.grouped_cycles(each, chip) / chip.clock
    assert seconds == pytest.approx(2 * 65_536 * 2048 * 768 / 459e12 / kernels.GROUPED_EFFICIENCY)


@pytest.mark.parametrize(
    ("parameters", "result"),
    [
        (["bf16[8,4096,14336]{2,1,0}", "bf16[8192,4096]{1,0}"], "bf16[8192,14336]{1,0}"),
        (["bf16[8192,4096]{1,0}", "bf16[8192,14336]{1,0}"], "bf16[8,4096,14336]{2,1,0}"),
    ],
)
def test_a_grouped_product_in_a_fusion_does_not_take_the_compilers_cycles(parameters, result):
    """Spelled as the compiler spells it for v6e, cycles included."""
    inner = "\n".join(f"  %p{n} = {shape} parameter({n})" for n, shape in enumerate(parameters))
    config = '{"convolution_algorithm_config":{"is_ragged_dot":true},"window_config":{"estimated_cycles":"956218411"}}'
    called = f"""%inner (p0: bf16[1], p1: bf16[1]) -> bf16[1] {{
{inner}
  ROOT %convolution.1 = {result} convolution(%p0, %p1), window={{size=8}}
}}
"""
    body = (
        f"  ROOT %fusion.1 = {result} fusion(%q0, %q1), kind=kCustom, calls=%inner, backend_config={config}"
    )
    made, chip = module(body, called), topologies.GENERATIONS["v6e"]
    each = made.computations["main"]["fusion.1"]
    seconds = kernels.grouped_cycles(each, chip, made.inside(each)) / chip.clock
    assert seconds == pytest.approx(2 * 8192 * 4096 * 14336 / 918e12 / kernels.GROUPED_EFFICIENCY)


def test_a_sparsecore_starts_when_it_has_the_operands_and_who_needs_the_result_waits():
    """Spelled as the compiler spells it for v6e: prepared by async-start, given the operands by async-update."""
    groups = "replica_groups=mesh['axis_0'=4] {'axis_0'}"
    work = 'backend_config={"estimated_cycles":"17500"}'  # 10 us at v6e's 1.75 GHz
    called = f"""%async (p: f32[1000000]) -> f32[1000000] {{
  %p = f32[1000000]{{0}} parameter(0)
  ROOT %all-reduce.1 = f32[1000000]{{0}} all-reduce(%p), {groups}
}}
"""
    body = f"""  %q = f32[1000000]{{0}} parameter(0)
  %call-start = ((), (), (s32[1]{{0}})) async-start(), async_execution_thread="sparsecore", calls=%async
  %before = f32[1000000]{{0}} add(%q, %q), {work}
  %call-update = ((f32[1000000]{{0}}), f32[1000000]{{0}}, (s32[1]{{0}})) async-update(%call-start, %before)
  %beside = f32[1000000]{{0}} add(%q, %q), {work}
  ROOT %call-done = f32[1000000]{{0}} async-done(%call-update)"""
    found = estimate(body, "v6e-4", others=called)
    traffic, part = found.traffic["all-reduce"], found.compute[cost.OTHER] / 2
    assert part > 0
    assert traffic.bytes == 4e6
    assert traffic.seconds > part
    assert traffic.exposed == pytest.approx(traffic.seconds - part)
    assert found.seconds == pytest.approx(part + traffic.seconds)


def test_a_collective_that_leaves_its_slice_is_charged_to_the_slow_network():
    groups = "replica_groups={{0,4},{1,5},{2,6},{3,7}}"
    text = f"""  %q = f32[8]{{0}} parameter(0)
  %inside = f32[1000000]{{0}} all-reduce(%q), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}
  ROOT %across = f32[1000000]{{0}} all-reduce(%q), {groups}"""
    result = estimate(text, "v4-8", slices=2)
    assert set(result.traffic) == {"all-reduce", "all-reduce" + cost.BETWEEN}
    across = result.traffic["all-reduce" + cost.BETWEEN]
    assert across.seconds == pytest.approx(2 * 4e6 / 2 / 6.25e9)  # two ways, half of it each time


def test_hosts_carry_what_goes_between_slices():
    """The form in which the compiler writes it: a send and a receive by the same rendezvous, through the hosts."""
    known = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    )
    known += '_xla_host_transfer_rendezvous="all-reduce.5_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    text = f"""  %q = bf16[3125000,2]{{1,0}} parameter(0)
  %t = token[] after-all()
  %recv = (bf16[3125000,2]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, {known}
  %send = (bf16[3125000,2]{{1,0}}, u32[], token[]) send(%q, %t), channel_id=2, {known}
  %one = f32[8]{{0}} fusion(%q), kind=kLoop, {CYCLES}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %got = (bf16[3125000,2]{{1,0}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true"""
    result = estimate(text, "v4-8", slices=2)
    between = result.traffic["all-reduce" + cost.BETWEEN]
    assert between.bytes == 12.5e6
    assert between.seconds == pytest.approx(2e-3)  # 12.5 MB, two ways, half of it each, at 6.25 GB/s
    assert between.exposed == pytest.approx(1e-3)
    assert result.seconds == pytest.approx(2e-3)


def test_a_loop_that_ends_with_the_data():
    called = f"""%body (p: (f32[8])) -> (f32[8]) {{
  %p = (f32[8]{{0}}) parameter(0)
  ROOT %work = (f32[8]{{0}}) fusion(%p), kind=kLoop, {CYCLES}
}}

%until (p: (f32[8])) -> pred[] {{
  %p.1 = (f32[8]{{0}}) parameter(0)
  ROOT %any = pred[] fusion(%p.1), kind=kLoop
}}
"""
    body = """  %q = (f32[8]{0}) parameter(0)
  ROOT %loop = (f32[8]{0}) while(%q), condition=%until, body=%body"""
    with pytest.raises(ValueError, match="cannot count the trips of loop"):
        estimate(body, "v4-8", others=called)
    twice = estimate(body, "v4-8", others=called, uncounted=2)
    assert twice.seconds == pytest.approx(2e-3)
