"""Small programs through the TPU compiler, and its messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.plan import hlo, topologies
from lemur_jax.plan.compile import compile_program, out_of_memory
from lemur_jax.plan.plan import GIB


@pytest.mark.parametrize("name", ["v5e-8", "v6e-8"])
def test_the_text_of_a_program_with_sparse_cores(tpu_compiler, name):
    """Rows of an embedding are looked up by v6e's SparseCores, which `Compiled.as_text` cannot write."""
    mesh = Mesh(np.array(list(topologies.described_devices(topologies.find_slice(name)))), ("x",))

    def struct(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    look_up = jax.jit(lambda table, ids: jnp.take(table, ids, axis=0) * 2)
    table, ids = struct((128_256, 2048), jnp.bfloat16), struct((65_536,), jnp.int32, "x")
    found = compile_program(look_up, table, ids, what="a lookup")
    assert found.fits
    module = hlo.parse(found.hlo)
    opcodes = {each.opcode for body in module.computations.values() for each in body.values()}
    assert ("async-update" in opcodes) == (name == "v6e-8")
    assert sum(each.cycles for each in module.computations[module.entry].values()) > 0


@pytest.mark.parametrize(
    ("message", "gibibytes"),
    [
        (
            "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries"
            " (53.65G) exceeds available HBM (30.75G). HLO module: jit_f.",
            53.65,
        ),
        # Vector memory of a kernel is no HBM.
        (
            "Ran out of memory in memory space vmem while allocating on stack for %splash_mqa_dkv = custom-call()."
            " Scoped allocation with size 18.62M and limit 16.00M exceeded scoped vmem limit by 2.62M.",
            0,
        ),
        ("Ran out of memory in memory space vmem. Used 18.62M of 16.00M vmem.", 0),
    ],
)
def test_reading_the_compilers_refusal(message, gibibytes):
    refused = out_of_memory(f"RESOURCE_EXHAUSTED: {message}", 1.0)
    assert not refused.fits
    assert refused.peak_bytes == pytest.approx(gibibytes * GIB, abs=1)
    assert refused.largest == ()


def test_reading_the_report_of_a_near_miss():
    message = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.12G of 30.75G hbm.
Exceeded hbm capacity by 2.37G.

Total hbm usage >= 34.00G:
    reserved        900.00M

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(update)/while/body/dot_general" source_file="llama.py"
     Shape: bf16[80,2,4096,8192]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[80,32,8192]{2,1,0}
     Allocation type: HLO temp
"""
    refused = out_of_memory(message, 1.0)
    assert refused.peak_bytes == pytest.approx(33.12 * GIB, abs=1)
    assert refused.largest == (
        (4 * GIB, "bf16[80,2,4096,8192] jit(update)/while/body/dot_general"),
        (GIB // 2, "f32[80,32,8192]"),
    )
