"""Paths on an object store stay there."""

import pytest
from etils import epath

from lemur_jax.common.paths import absolute, is_object_store


@pytest.mark.parametrize("kind", [str, epath.Path])
def test_absolute_paths(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    assert absolute(kind("run/checkpoints")) == epath.Path(tmp_path / "run" / "checkpoints")
    assert str(absolute(kind("gs://bucket/run"))) == "gs://bucket/run"
    assert is_object_store(kind("gs://bucket/run"))
    assert not is_object_store(kind("run"))
