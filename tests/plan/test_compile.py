"""What the TPU compiler says of small programs, without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.plan import compile as compiling
from lemur_jax.plan import hlo, topologies


@pytest.mark.parametrize("name", ["v5e-8", "v6e-8"])
def test_program_is_written_out_also_where_a_sparse_core_takes_part(name):
    """Rows of an embedding are looked up by v6e's SparseCores, which `Compiled.as_text` cannot write."""
    pytest.importorskip("libtpu", reason='the TPU compiler is missing: pip install "lemur_jax[plan]"')
    mesh = Mesh(np.array(list(topologies.devices(topologies.find(name)))), ("x",))

    def struct(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    look_up = jax.jit(lambda table, ids: jnp.take(table, ids, axis=0) * 2)
    table, ids = struct((128_256, 2048), jnp.bfloat16), struct((65_536,), jnp.int32, "x")
    found = compiling.compile_program(look_up, table, ids)
    assert found.fits
    module = hlo.parse(found.hlo)
    opcodes = {each.opcode for body in module.computations.values() for each in body}
    assert ("async-update" in opcodes) == (name == "v6e-8")
    assert sum(each.cycles for each in module.computations[module.entry]) > 0
