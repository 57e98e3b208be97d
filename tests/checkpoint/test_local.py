"""Local checkpoints give back the bits, of their own mesh alone, and none of a damaged one."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lemur_jax.checkpoint import local
from lemur_jax.checkpoint.local import LocalCheckpoints, directory_of
from lemur_jax.checkpoint.manager import make_metadata
from lemur_jax.common.errors import UserError
from lemur_jax.parallel.mesh import make_mesh
from tests.checkpoint.test_policies import full_disk, left_of_orbax, no_directories

METADATA = make_metadata(
    model={"hidden_size": 16}, tokenizer_files={"tokenizer.model": b"x"}, data={"a": "1"}
)


def mesh_of(data, fsdp):
    return make_mesh({"data": data, "fsdp": fsdp, "sequence": 1, "tensor": 1})


def state_on(mesh, step):
    """(params, optimizer) that are another at each step."""
    cut, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    weights = np.random.default_rng(step).standard_normal((64, 16), np.float32)
    params = {"layers": jax.device_put(weights, cut), "norm": jax.device_put(weights[0], whole)}
    return params, {"count": jax.device_put(np.int32(step), whole)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(path, mesh, steps, say=print):
    with LocalCheckpoints(path, mesh, say) as checkpoints:
        for step in steps:
            checkpoints.save(step, *state_on(mesh, step), METADATA)


def restore(path, mesh, newer_than=0, check=lambda metadata: None):
    """What is restored, and what was said."""
    said = []
    with LocalCheckpoints(path, mesh, said.append) as checkpoints:
        wanted = map(abstract, state_on(mesh, 0))
        return checkpoints.restore_newest(*wanted, check, newer_than), said


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
def test_the_newest_comes_back_bit_for_bit(tmp_path, shape):
    mesh = mesh_of(*shape)
    save(tmp_path, mesh, [1, 3, 5])
    seen = []
    (step, *found), said = restore(tmp_path, mesh, check=seen.append)
    assert (step, said) == (5, [])
    jax.tree.map(np.testing.assert_array_equal, found, list(state_on(mesh, 5)))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
        lambda x: x.sharding, list(state_on(mesh, 5))
    )
    assert seen[0]["data"] == {"a": "1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5"]  # the oldest made room
    assert restore(tmp_path, mesh, newer_than=5)[0] is None


def test_of_another_mesh_it_is_left_alone(tmp_path):
    save(tmp_path, mesh_of(1, 8), [3])
    found, said = restore(tmp_path, mesh_of(2, 4))
    assert found is None
    assert "another mesh" in said[0]
    assert restore(tmp_path, mesh_of(1, 8))[0][0] == 3


def largest_file(path):
    return max((file for file in path.rglob("d/*") if file.is_file()), key=lambda file: file.stat().st_size)


def truncate(path):
    file = largest_file(path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(path):
    largest_file(path).unlink()


def flip(path):
    file = largest_file(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0x10
    file.write_bytes(data)


def break_the_seal(path):
    file = path / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"hidden_size": 16', '"hidden_size": 17'))


@pytest.mark.parametrize("hurt", [truncate, remove, flip, break_the_seal])
def test_what_is_not_as_it_was_saved_is_named_and_removed(tmp_path, hurt):
    """The one before is used."""
    save(tmp_path, mesh_of(1, 8), [2, 3])
    hurt(tmp_path / "3")
    (step, *found), said = restore(tmp_path, mesh_of(1, 8))
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, found, list(state_on(mesh_of(1, 8), 2)))
    assert f"{tmp_path}/3" in said[0]
    assert "WARNING" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


@pytest.mark.parametrize("refusing", [full_disk, no_directories])
def test_a_refused_save_is_reported_once_and_leaves_nothing_that_waits(tmp_path, refusing):
    """Also at the end, when nobody saves after it."""
    mesh, said = mesh_of(1, 8), []
    checkpoints = LocalCheckpoints(tmp_path, mesh, said.append)
    checkpoints.save(1, *state_on(mesh, 1), METADATA)
    checkpoints._wait()
    with refusing():
        checkpoints.save(2, *state_on(mesh, 2), METADATA)
        checkpoints._wait()
    assert len(said) == 1
    checkpoints.save(3, *state_on(mesh, 3), METADATA)
    checkpoints._wait()
    with refusing():
        checkpoints.save(4, *state_on(mesh, 4), METADATA)
        checkpoints.__exit__()
    assert len(said) == 2
    assert not left_of_orbax()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    save(tmp_path, mesh, [5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5"]  # nothing was forgotten on the disk
    assert restore(tmp_path, mesh)[0][0] == 5


def test_values_other_than_those_that_were_saved_are_not_taken(tmp_path, monkeypatch):
    """Files that read well, with another digest than the arrays had."""
    mesh, measured = mesh_of(1, 8), local.measured

    def lie(tree, where):
        leaves = measured(tree, where)()
        return lambda: {
            name: dataclasses.replace(leaf, digest=leaf.digest ^ 1) for name, leaf in leaves.items()
        }

    with monkeypatch.context() as lying:
        lying.setattr(local, "measured", lie)
        save(tmp_path, mesh, [3])
    found, said = restore(tmp_path, mesh)
    assert found is None
    assert "is not what was saved (digest" in said[0]
    assert not list(tmp_path.iterdir())


def test_other_data_are_refused(tmp_path):
    save(tmp_path, mesh_of(1, 8), [3])

    def refuse(metadata):
        raise UserError("other data")

    with pytest.raises(UserError, match="other data"):
        restore(tmp_path, mesh_of(1, 8), check=refuse)


def test_without_room_the_step_is_passed_over_and_said(tmp_path, monkeypatch):
    usage = local.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = []
    save(tmp_path, mesh_of(1, 8), [3], said.append)
    assert "no room" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_file_in_its_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="local_directory"):
        LocalCheckpoints(tmp_path / "file", mesh_of(1, 8))


def test_each_host_reads_its_own_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("DISK", str(tmp_path))
    assert directory_of("$DISK/lemur", "run") == tmp_path / "lemur" / "run"
