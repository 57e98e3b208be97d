"""The names that `lemur_jax` exports, the version, and the wheel with its example configs."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

import lemur_jax

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("name", [name for name in lemur_jax.__all__ if name != "prepare_data"])
def test_public_names_exist_and_are_documented(name):
    assert getattr(lemur_jax, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lemur_jax.trian  # noqa: B018


def test_importing_the_package_imports_no_framework():
    code = "import sys, lemur_jax; print([m for m in ('jax', 'tensorflow', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_in_one_place():
    assert f"## {lemur_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {lemur_jax.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert "version = attr: lemur_jax.__version__" in (ROOT / "setup.cfg").read_text()


@pytest.mark.slow
def test_the_wheel_carries_the_package_and_the_example_configs(tmp_path):
    words = f"-m pip wheel --no-deps --quiet --wheel-dir {tmp_path} {ROOT}"
    subprocess.run([sys.executable, *words.split()], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*ROOT.glob("lemur_jax/**/*.py"), *ROOT.glob("lemur_jax/**/*.yaml")]:
        assert str(path.relative_to(ROOT)) in names
    for path in ROOT.glob("configs/*.py"):
        assert f"lemur_jax/configs/{path.name}" in names


def test_setup_cfg_lists_every_package():
    listed = (ROOT / "setup.cfg").read_text().partition("packages =\n")[2].partition("package_dir")[0].split()
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("lemur_jax/**/*.py")}
    assert set(listed) == found | {"lemur_jax.configs"}
