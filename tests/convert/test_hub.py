"""Models named ORG/NAME[@REVISION], from a server on this machine that speaks the hub's API."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.common.hub import local_model
from lemur_jax.infer.session import load
from tests.helpers.hub import SHA, serve_hub

SCRIPT = """
import json, sys
from lemur_jax import config_from_checkpoint
from lemur_jax.cli import main
from lemur_jax.common.hub import local_model

codes = [main(["import-hf", name, f"made{number}"]) for number, name in enumerate(json.loads(sys.argv[1]))]
config = config_from_checkpoint("org/chat@v1")
print(json.dumps([codes, config.to_dict()["tokenizer"]["path"], config.init.checkpoint, str(local_model("org/chat"))]))
"""


@pytest.mark.process
def test_a_model_of_the_hub_is_downloaded_once_and_other_names_are_one_line(chat_model_export, tmp_path):
    published = shutil.copytree(chat_model_export, tmp_path / "published")
    (published / "consolidated.safetensors").write_bytes(b"the same weights in Mistral's own layout")
    repositories = {"org/chat": published, "org/closed": published}
    names = ["org/chat", "org/chat@v1", "org/chat@v9", "org/closed", "org/none"]
    with serve_hub(repositories, gated={"org/closed"}, cut={"model.safetensors"}) as (address, requests):
        variables = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(names)],
            env=os.environ | variables | {"HF_HUB_DISABLE_XET": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    codes, tokenizer, checkpoint, directory = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 2, 2, 2]
    assert (tokenizer, checkpoint) == ("org/chat@v1", "org/chat@v1")
    assert directory.endswith(SHA)
    weights = [path for method, path, _ in requests if method == "GET" and path.endswith(".safetensors")]
    assert len(weights) == 2  # the first broke off; the cache answers all later ones
    errors = [line for line in done.stderr.splitlines() if line.startswith("lemur import-hf: ")]
    assert "org/chat has no revision v9" in errors[0]
    assert "org/closed is gated: accept its terms" in errors[1]
    assert "no model org/none on the hub" in errors[2]
    session, expected = (
        load(path, {"fsdp": -1}, "float32") for path in (tmp_path / "made1", chat_model_export)
    )
    assert session.model == expected.model
    assert session.need_tokenizer().files() == expected.need_tokenizer().files()


def test_a_name_whose_first_component_is_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert local_model("runs/chat") == "runs/chat"
    assert local_model("a/b/c") == "a/b/c"
    assert local_model("gs://a/b") == "gs://a/b"
    # Offline, as tests are.
    with pytest.raises(
        UserError, match="no directory org/chat here, and org/chat cannot be had from the hub"
    ):
        local_model("org/chat")
