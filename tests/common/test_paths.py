"""Paths on an object store stay there."""

import pytest
import tensorstore as ts
from etils import epath

from lemur_jax.common.paths import absolute, is_object_store, is_refused_by_store, store_url


@pytest.mark.parametrize("kind", [str, epath.Path])
def test_absolute_paths(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    assert absolute(kind("run/checkpoints")) == epath.Path(tmp_path / "run" / "checkpoints")
    assert str(absolute(kind("gs://bucket/run"))) == "gs://bucket/run"
    assert is_object_store(kind("gs://bucket/run"))
    assert not is_object_store(kind("run"))


@pytest.mark.parametrize("path", ["/a b/ü#1?/100%20/x", "gs://bucket/a b/ü#1?/100%20"])
def test_tensorstore_reads_the_path_that_was_meant(path):
    described = ts.KvStore.Spec(store_url(path)).to_json()
    assert described["path"] == f"{path.removeprefix('gs://bucket/')}/"


def test_refusals_of_tensorflow():
    errors = pytest.importorskip("tensorflow", reason="needs the extra test").errors
    for kind in ("PermissionDenied", "Unauthenticated", "Unavailable", "Aborted", "DeadlineExceeded"):
        assert is_refused_by_store(getattr(errors, f"{kind}Error")(None, None, "gs://bucket/run"))
    # What is not there, or not as it should be, is no matter of the network.
    for kind in ("NotFound", "DataLoss", "InvalidArgument"):
        assert not is_refused_by_store(getattr(errors, f"{kind}Error")(None, None, "gs://bucket/run"))
