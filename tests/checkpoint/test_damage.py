"""Damaged checkpoints: whichever file is hurt, in whichever way, no wrong value is ever restored."""

import errno
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from lemur_jax.checkpoint import listing, manager
from lemur_jax.checkpoint.metadata import Damaged, make_metadata
from lemur_jax.checkpoint.reading import read_metadata, restore_params, steps_in
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.common.errors import UserError
from lemur_jax.convert.export_hf import export_hf
from tests.helpers.tiny import first_state, program_on

METADATA = make_metadata(model={"vocab_size": 512}, tokenizer_files={"tokenizer.model": b"abc"})
PROGRAM = program_on((1, 1, 1, 1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints 5 and 9 of different states, the newer of a four-device mesh."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    old, new = first_state(PROGRAM), first_state(program_on((1, 4, 1, 1)))
    new_params = jax.tree.map(lambda x: x + 1, new.params)
    with manager.Checkpoints(path) as checkpoints:
        checkpoints.save(5, old.params, old.optimizer, METADATA)
        checkpoints.save(9, new_params, new.optimizer, METADATA)
    return path, {5: (old.params, old.optimizer), 9: (new_params, new.optimizer)}


def flip(path: pathlib.Path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


def truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


def restore_newest(path, check=lambda metadata: None):
    with manager.Checkpoints(path) as checkpoints:
        return checkpoints.restore_newest(PROGRAM.state.params, PROGRAM.state.optimizer, check)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("lemur_jax")]


@pytest.mark.parametrize("harm", [flip, truncate, pathlib.Path.unlink])
def test_any_file_hurt_gives_the_same_bits_or_the_previous_checkpoint(run, tmp_path, harm, caplog):
    path, states = run
    files = [f.relative_to(path) for f in sorted((path / "9").rglob("*")) if f.is_file()]
    skipped = []
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(path, copy)
        harm(copy / file)
        said = listing.verify(epath.Path(copy), 9)
        caplog.clear()
        step, *state = restore_newest(copy)
        lines = warnings(caplog)
        assert same(tuple(state), states[step]), file
        assert (step == 5) == bool(lines)
        # A restore does without this file where it is missing, but an export does not.
        if not (file.name == "_METADATA" and harm is pathlib.Path.unlink):
            assert said.partition(" ")[0] == ("verified" if step == 9 else "DAMAGED:"), (file, said)
            assert "tensorstore_spec" not in said
        if step == 5:
            skipped.append(str(file))
            assert f"checkpoint {copy}/9" in lines[0]
            assert "4 steps are lost" in lines[0]
            assert (copy / "damaged-9").is_dir()
        shutil.rmtree(copy)
    # Data of both items and the metadata were among them; what is left has no part in a restore.
    assert {name.split("/")[1] for name in skipped} >= {"params", "optimizer", "metadata"}
    assert sum("/d/" in name for name in skipped) >= 2


def test_step_of_the_damaged_one_can_be_saved_again(run, tmp_path):
    path, states = run
    shutil.copytree(path, tmp_path / "c")
    (tmp_path / "c" / "9" / "metadata" / "metadata").unlink()
    with manager.Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        restored = checkpoints.restore_newest(PROGRAM.state.params, PROGRAM.state.optimizer, lambda m: None)
        checkpoints.save(7, *restored[1:], METADATA)
        checkpoints.wait()
        assert checkpoints.finished == 7
        checkpoints.save(9, *restored[1:], METADATA)
        checkpoints.wait()
        assert checkpoints.finished == 9
    assert same(restored[1:], states[5])


def test_all_damaged_is_an_error_and_leaves_them(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "c")
    for step in (5, 9):
        flip(tmp_path / "c" / str(step) / "metadata" / "metadata")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; checkpoint .*/9.* is damaged"):
        restore_newest(tmp_path / "c")
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"5", "9"}


def test_what_does_not_fit_is_no_damage(run, tmp_path):
    """A refusal of the caller, or a leaf of another shape, skips nothing."""

    def refuse(metadata):
        raise UserError("other data")

    with pytest.raises(UserError, match="other data"):
        restore_newest(run[0], refuse)
    wanted = {**PROGRAM.state.params, "extra": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with manager.Checkpoints(run[0]) as checkpoints, pytest.raises(UserError, match="extra is missing"):
        checkpoints.restore_newest(wanted, PROGRAM.state.optimizer, lambda m: None)
    assert {p.name for p in run[0].iterdir()} == {"5", "9"}


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code):
        super().__init__(f"error {code}")
        self.code = code


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("timed out"),
        *(OSError(getattr(errno, name), name) for name in ("EMFILE", "ENFILE", "EIO", "ESTALE", "ENOMEM")),
        *(ValueError(f"{status}: no luck") for status in ("ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN")),
        HttpError(429),
        HttpError("503"),
    ],
    ids=repr,
)
def test_an_error_that_passes_is_no_damage(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    before = sorted(run[0].rglob("*"))
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(UserError, match=r"/9, .* cannot be read now") as caught:
        restore_newest(run[0])
    assert not isinstance(caught.value, Damaged)
    assert listing.verify(epath.Path(run[0]), 9).startswith("NOT VERIFIED: ")
    assert sorted(run[0].rglob("*")) == before


def test_who_names_a_damaged_step_hears_of_the_others(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    for file in (copy / "9" / "metadata").iterdir():
        truncate(file)
    for read in (
        lambda: read_metadata(copy),
        lambda: restore_params(copy, PROGRAM.state.params),
        lambda: export_hf(copy, tmp_path / "out"),
    ):
        with pytest.raises(Damaged, match=r"copy/9.* is damaged.*; there are also steps 5 \(--step\)$"):
            read()
    with pytest.raises(UserError, match=r"no finished checkpoint in .*copy/5: name .*/copy and --step 5$"):
        read_metadata(copy / "5")
    shutil.rmtree(copy / "5")
    with pytest.raises(Damaged) as caught:
        read_metadata(copy)
    assert "--step" not in str(caught.value)


def test_on_an_object_store_it_is_copied_aside_before_it_is_deleted(run, tmp_path, monkeypatch, caplog):
    """A local directory that may not be renamed stands in for one."""
    path, states = run
    shutil.copytree(path, tmp_path / "c")
    flip(tmp_path / "c" / "9" / "metadata" / "metadata")
    hurt = contents(tmp_path / "c" / "9")
    monkeypatch.setattr(manager, "is_object_store", lambda path: True)
    monkeypatch.setattr(type(manager.epath.Path(path)), "rename", None)
    step, *state = restore_newest(tmp_path / "c")
    assert step == 5
    assert same(tuple(state), states[5])
    assert f"kept as {tmp_path}/c/damaged-9" in warnings(caplog)[0]
    assert contents(tmp_path / "c" / "damaged-9") == hurt
    assert not (tmp_path / "c" / "9").exists()


def contents(path: pathlib.Path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    """And the checkpoint before stays."""
    state = first_state(PROGRAM)
    bad = with_nan(state.params)
    with manager.Checkpoints(tmp_path, keep=1, max_failures=3) as checkpoints:

        def save(step, params):
            checkpoints.save(step, params, state.optimizer, METADATA)
            checkpoints.wait()

        save(2, state.params)
        with pytest.raises(
            UserError, match=r"step 3 is not saved: params: layers/mlp/up has values .* finite"
        ):
            save(3, bad)
        assert checkpoints.finished == 2
        assert {p.name for p in tmp_path.iterdir()} == {"2"}
        save(4, state.params)
    assert steps_in(tmp_path)[1] == [4]


def with_nan(params):
    bad = jax.tree.map(lambda x: x, params)
    bad["layers"]["mlp"]["up"] = bad["layers"]["mlp"]["up"].at[0, 1, 2].set(jnp.nan)
    return bad


def test_values_that_are_not_finite_are_not_restored(tmp_path):
    bad = with_nan(first_state(PROGRAM).params)
    write_params(tmp_path / "imported", bad, METADATA)
    with pytest.raises(Damaged, match="layers/mlp/up has values that are not finite"):
        restore_params(tmp_path / "imported", PROGRAM.state.params)
    said = listing.verify(epath.Path(tmp_path / "imported"), 0)
    assert said == "DAMAGED: params: layers/mlp/up has values that are not finite"


def test_a_renamed_step_is_refused(run, tmp_path):
    """Its parameters would go on with the data and the learning rate of another step."""
    shutil.copytree(run[0], tmp_path / "c")
    (tmp_path / "c" / "9").rename(tmp_path / "c" / "12")
    with pytest.raises(UserError, match=r"c/12 is that of step 9: rename the directory back"):
        restore_newest(tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"5", "12"}


def test_other_format_is_told_apart(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "c")
    file = tmp_path / "c" / "9" / "metadata" / "metadata"
    file.write_text(file.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match="has checkpoint format 1, this version reads 2") as caught:
        restore_newest(tmp_path / "c")
    assert not isinstance(caught.value, Damaged)
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"5", "9"}
