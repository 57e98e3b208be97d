"""The JobSet against Kubernetes' own schema of a Job, and what Slurm would be given."""

import importlib.util
import json
import pathlib
import stat
import subprocess

import pytest

from lemur_jax.plan.topologies import find

ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = [
    "--config", "configs/lemur_7b_pretrain.py", "--workdir", "gs://bucket/run", "--image", "registry/lemur:1",
    "--name", "my-run",
]  # fmt: skip

# What JobSet adds around a Job, from its custom resource definition (jobset.x-k8s.io/v1alpha2).
JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer"},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["action", "name"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {
                                        "type": "string",
                                        "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
                                    },
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def gke():
    spec = importlib.util.spec_from_file_location("gke", ROOT / "launch" / "gke.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def manifest(gke, capsys, *words):
    assert gke.main([*ARGUMENTS, *words]) == 0
    comment, _, text = capsys.readouterr().out.partition("\n")
    assert comment.startswith("# lemur train")
    return json.loads(text)


@pytest.mark.parametrize(
    "words",
    [
        ["--topology", "v4-128"],
        [
            "--topology",
            "v5e-256",
            "--slices",
            "2",
            "--spot",
            "--secret",
            "tokens",
            "--service-account",
            "trainer",
        ],
    ],
)
def test_manifest_is_valid(gke, capsys, monkeypatch, words):
    jsonschema = pytest.importorskip("jsonschema")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    monkeypatch.chdir(ROOT)
    found = manifest(gke, capsys, *words)
    jsonschema.validate(found, JOBSET)
    (job,) = found["spec"]["replicatedJobs"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **job["template"]}
    kubernetes_validate.validate(whole, "1.31", strict=True)
    # The validator is awake.
    whole["spec"]["parallelism"] = "four"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, "1.31", strict=True)


def test_manifest_says_what_was_asked(gke, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--topology", "v4-128", "--slices", "2", "--spot", "--secret", "tokens", "--config.seed=7"]
    (job,) = manifest(gke, capsys, *words)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, 16, 16)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["command"][-1] == "--config.seed=7"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """Puts a `kubectl` in the path that keeps what it is given and ends as it is told."""

    def install(script):
        fake = tmp_path / "kubectl"
        fake.write_text(
            f'#!/bin/bash\necho "$@" >{tmp_path}/arguments\n/bin/cat >{tmp_path}/manifest\n{script}\n'
        )
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    install.home = tmp_path
    return install


def test_apply_hands_kubectl_what_would_be_printed(gke, capsys, kubectl):
    kubectl("echo jobset.jobset.x-k8s.io/my-run created")
    printed = manifest(gke, capsys, "--topology", "v4-8")
    assert not (kubectl.home / "arguments").exists()
    assert gke.main([*ARGUMENTS, "--topology", "v4-8", "--apply"]) == 0
    assert (kubectl.home / "arguments").read_text() == "apply -f -\n"
    assert json.loads((kubectl.home / "manifest").read_text().partition("\n")[2]) == printed
    assert capsys.readouterr().out == "jobset.jobset.x-k8s.io/my-run created\n"


@pytest.mark.parametrize(
    "reason",
    [
        "exceeded quota: tpu, requested: google.com/tpu=64",
        'no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"',
        "Unable to connect to the server: dial tcp: i/o timeout",
    ],
)
def test_refusals_of_kubectl_are_passed_on(gke, capsys, kubectl, reason):
    kubectl(f"echo '{reason}' >&2; exit 1")
    assert gke.main([*ARGUMENTS, "--topology", "v4-8", "--apply"]) == 2
    assert f"kubectl apply ended with 1: {reason}" in capsys.readouterr().err


def test_without_kubectl_it_says_so(gke, capsys, kubectl):
    assert gke.main([*ARGUMENTS, "--topology", "v4-8", "--apply"]) == 2
    assert "cannot call kubectl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [("v4-8", (1, 4)), ("v4-512", (64, 4)), ("v5e-1", (1, 1)), ("v5e-8", (1, 8)), ("v5e-16", (4, 4)),
     ("v6e-256", (64, 4)), ("v5p-128", (16, 4)), ("tpu7x-64", (8, 4))],
)  # fmt: skip
def test_hosts_of_a_slice(gke, name, expected):
    assert gke.hosts_and_chips(find(name)) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--topology", "v4-100"], "unknown TPU slice"),
        (["--topology", "v4-8", "--name", "My_Run"], "--name is 'My_Run'"),
        (["--topology", "v4-8", "--config.mesh.tensor=7"], "does not multiply"),
        (["--topology", "v4-8", "--config.train.stps=7"], "did you mean train.steps"),
    ],
)
def test_mistakes_are_one_line(gke, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(ROOT)
    assert gke.main([*ARGUMENTS, *words]) == 2
    assert expected in capsys.readouterr().err


# --- Slurm


@pytest.fixture
def slurm(tmp_path):
    fake = tmp_path / "sbatch"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/arguments\ncat >{tmp_path}/script\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "secrets.env").write_text("TOKEN=hunter2\n")

    def run(*words, settings=""):
        text = f"RUN=my-run\nCONFIG=configs/lemur_7b_pretrain.py\nWORKDIR=/shared/run\n{settings}"
        (tmp_path / "settings.sh").write_text(text)
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "slurm.sh"), "--settings", str(tmp_path / "settings.sh"), *words],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )

    run.home = tmp_path
    return run


def test_slurm_gets_a_batch_script(slurm):
    settings = f"OVERRIDES=('--config.a=x y')\nENVIRONMENT=('A=b c')\nSECRETS_FILE={slurm.home}/secrets.env\n"
    done = slurm(settings=settings)
    assert done.returncode == 0, done.stderr
    arguments = (slurm.home / "arguments").read_text().splitlines()
    assert {"--job-name=my-run", "--nodes=2", "--ntasks-per-node=8", "--requeue"} <= set(arguments)
    script = (slurm.home / "script").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "--workdir /shared/run --config.a=x\\ y" in script
    assert "export A=b\\ c" in script
    assert "hunter2" not in script + "".join(arguments)


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(75, 0, True), (137, 19, True), (75, 20, False), (2, 0, False), (0, 0, False)],
)
def test_slurm_requeues_when_a_host_was_lost(slurm, status, restarts, requeued):
    slurm()
    for name, text in {"srun": f"exit {status}", "scontrol": f'echo "$@" >{slurm.home}/requeued'}.items():
        (slurm.home / name).write_text(f"#!/bin/bash\n{text}\n")
        (slurm.home / name).chmod(0o755)
    environment = {
        "PATH": f"{slurm.home}:/usr/bin:/bin",
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": f"{restarts}",
    }
    done = subprocess.run(["bash", str(slurm.home / "script")], env=environment)
    assert done.returncode == status
    assert (slurm.home / "requeued").exists() == requeued


def test_slurm_dry_run_submits_nothing(slurm):
    done = slurm("--dry-run")
    assert done.stdout.startswith("sbatch --job-name=my-run")
    assert not (slurm.home / "arguments").exists()


def test_slurm_without_a_workdir_is_refused(slurm):
    done = slurm(settings="WORKDIR=\n")
    assert (done.returncode, "WORKDIR is empty" in done.stderr) == (2, True)
