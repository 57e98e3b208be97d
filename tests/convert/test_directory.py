"""A directory is there whole or not at all, also where directories cannot be renamed."""

import os
import subprocess
import sys

import pytest
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.convert import directory
from lemur_jax.convert.export_hf import export_hf
from tests.helpers.hf_faults import FAULTS


@pytest.fixture(params=["file system", "object store"])
def storage(request, monkeypatch):
    """A local directory that is not renamed stands in for an object store."""
    if request.param == "object store":
        monkeypatch.setattr(directory, "is_object_store", lambda path: True)


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_raised_the_part_is_removed(tmp_path, error):
    def fail(part):
        (part / "file").write_text("half")
        raise error

    with pytest.raises(error), directory.atomic_directory(epath.Path(tmp_path / "out")) as part:
        fail(part)
    assert not list(tmp_path.iterdir())
    with directory.atomic_directory(epath.Path(tmp_path / "out")) as part:
        (part / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_nothing_is_no_target(checkpoint, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="out is a link to a place that does not exist"):
        export_hf(checkpoint, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_one_process_at_a_time_writes_a_target(tmp_path):
    """A living one is not disturbed; what a killed one has left is removed."""
    code = "import sys; from etils import epath; from lemur_jax.convert import directory\n"
    code += "with directory.atomic_directory(epath.Path(sys.argv[1])) as part:\n"
    code += "    (part / 'file').touch(); print(flush=True); input()"
    target = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        other.stdout.readline()
        with (
            pytest.raises(UserError, match=f"another process is writing {target}"),
            directory.atomic_directory(epath.Path(target)),
        ):
            pass
        assert (tmp_path / ".out.partial" / "file").exists()
        other.kill()
    for name in ("first", "second"):  # which replaces the first
        (tmp_path / ".out.old").mkdir()
        (tmp_path / ".out.old" / "file").touch()
        with directory.atomic_directory(epath.Path(target)) as part:
            (part / name).touch()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in target.iterdir()] == [name]


@pytest.mark.slow
def test_imports_onto_gs_and_from_there(emulator, make_model, tmp_path):
    """One that fails leaves nothing; the others are whole, and lie there. A model on gs:// is that of a disk."""
    hf = make_model()

    def lemur(*words, status=0):
        done = subprocess.run(
            [sys.executable, "-m", "lemur_jax", *map(str, words)],
            env=emulator | {"PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stderr
        return done

    lemur("import-hf", hf.path, "gs://bucket/whole")
    lemur("import-hf", hf.path, "gs://bucket/whole", "--overwrite")
    assert "verified (params)" in lemur("checkpoints", "gs://bucket/whole").stdout
    lemur("export-hf", "gs://bucket/whole", "out", "--dtype", "float32", "--verify")
    lemur("export-hf", "gs://bucket/whole", "gs://bucket/hf", "--dtype", "float32")
    lemur("import-hf", "gs://bucket/hf", "back", "--dtype", "float32")
    lemur("export-hf", "back", "again", "--dtype", "float32")
    files = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert len(set(files)) == 1
    FAULTS["NaN"][0](hf)
    done = lemur("import-hf", hf.path, "gs://bucket/broken", status=2)
    assert "not finite" in done.stderr.splitlines()[-1]  # above it, gcsfs warns of the emulator
    assert "Traceback" not in done.stderr
    done = lemur("checkpoints", "gs://bucket/broken", status=2)
    assert "lemur checkpoints: no checkpoint directory at gs://bucket/broken\n" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "back", "hf", "out"]
