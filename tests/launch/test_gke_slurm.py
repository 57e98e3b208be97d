"""The JobSet against Kubernetes' own schema of a Job, and what Slurm would be given."""

import importlib.util
import json
import os
import pathlib
import shlex
import stat
import subprocess
import sys

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
def gke_sh(tmp_path):
    """`launch/gke.sh WORDS` with a `kubectl` that keeps what it is given and ends as it is told."""

    def run(*words, settings="", kubectl="echo done", python=sys.executable):
        fake = tmp_path / "kubectl"
        fake.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\ncat >{tmp_path}/manifest\n{kubectl}\n')
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        text = "RUN=my-run\nCONFIG=configs/lemur_7b_pretrain.py\nWORKDIR=gs://bucket/run\nACCELERATOR=v4-16\n"
        (tmp_path / "settings.sh").write_text(text + f"IMAGE=registry/lemur:1\n{settings}")
        (tmp_path / "calls").write_text("")
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "gke.sh"), *words, "--settings", str(tmp_path / "settings.sh")],
            env={
                **os.environ,
                "PATH": f"{tmp_path}:/usr/bin:/bin",
                "PYTHON": python,
                "PYTHONPATH": str(ROOT),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    run.home = tmp_path
    run.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return run


def test_start_hands_kubectl_what_the_dry_run_prints(gke_sh):
    settings = (
        "ACCELERATOR=v5litepod-16\nSLICES=2\nPROVISIONING=spot\nSECRET=tokens\nNAMESPACE=training\n"
        "ENVIRONMENT=('A_FLAG=two words')\nOVERRIDES=(--config.seed=7)\n"
    )
    printed = gke_sh("start", "--dry-run", settings=settings)
    assert printed.returncode == 0, printed.stderr
    assert gke_sh.calls() == []
    first, *told, last = printed.stdout.splitlines()
    assert (first, last) == ("kubectl apply -f - <<'MANIFEST'", "MANIFEST")
    done = gke_sh("start", settings=settings, kubectl="echo jobset.jobset.x-k8s.io/my-run created")
    assert done.stdout == "jobset.jobset.x-k8s.io/my-run created\n"
    assert gke_sh.calls() == ["apply -f -"]
    text = (gke_sh.home / "manifest").read_text()
    assert text.splitlines() == told
    found = json.loads(text.partition("\n")[2])
    assert found["metadata"] | {"annotations": None} == {
        "name": "my-run", "namespace": "training", "annotations": None,
    }  # fmt: skip
    (job,) = found["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert (job["replicas"], pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]) == (2, "4x4")
    (container,) = pod["containers"]
    assert {"name": "A_FLAG", "value": "two words"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    assert container["command"][-1] == "--config.seed=7"


@pytest.mark.parametrize(
    ("verb", "calls"),
    [
        ("status", [
            "get jobset my-run --namespace default",
            "get pods --namespace default --selector jobset.sigs.k8s.io/jobset-name=my-run",
        ]),
        ("logs", [
            "logs --follow --namespace default --selector jobset.sigs.k8s.io/jobset-name=my-run,"
            "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        ]),
        ("delete", ["delete jobset my-run --namespace default"]),
    ],
)  # fmt: skip
def test_the_other_verbs_call_kubectl(gke_sh, verb, calls):
    printed = gke_sh(verb, "--dry-run")
    told = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert told == [["kubectl", *call.split()] for call in calls]
    assert gke_sh.calls() == []
    assert gke_sh(verb).returncode == 0
    assert gke_sh.calls() == calls


# What a cluster says of the set: nothing at first, then that its pod is pulled, then that it runs, then how it ended.
CLUSTER = """
case "$*" in
  *"get pods"*)
    echo x >>$HOME/looks
    case $(wc -l <$HOME/looks) in
      1) echo " " ;;
      2) echo "Pending ImagePullBackOff" ;;
      *) echo "Running " ;;
    esac ;;
  logs*) echo 'ok    versions  python'; echo 'verdict: SAID' ;;
  *"get jobset"*) if grep -q ^logs $HOME/calls; then echo "StartupPolicyCompleted ENDED"; fi ;;
esac
"""
CLUSTER_CALLS = [
    "delete jobset my-run-doctor --namespace default --ignore-not-found",
    "apply -f -",
    "get pods --namespace default --selector jobset.sigs.k8s.io/jobset-name=my-run-doctor,"
    "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    " --output jsonpath={.items[*].status.phase} {.items[*].status.containerStatuses[*].state.waiting.reason}",
    "logs --follow --tail=-1 --namespace default --selector jobset.sigs.k8s.io/jobset-name=my-run-doctor,"
    "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0",
    "get jobset my-run-doctor --namespace default"
    ' --output jsonpath={.status.conditions[?(@.status=="True")].type}',
]


@pytest.mark.parametrize(
    ("ended", "said", "status"), [("Completed", "4 hosts ready", 0), ("Failed", "not ready", 2)]
)
def test_doctor_of_gke_sh_waits_for_the_verdict(gke_sh, ended, said, status):
    settings = "OVERRIDES=(--config.seed=7)\nPOLL_SECONDS=0\n"
    printed = gke_sh("doctor", "--dry-run", settings=settings)
    assert printed.returncode == 0, printed.stderr
    assert gke_sh.calls() == []
    before, _, rest = printed.stdout.partition("kubectl apply -f - <<'MANIFEST'\n")
    manifest, _, after = rest.partition("\nMANIFEST\n")
    told = [shlex.split(line) for line in [*before.splitlines(), "kubectl apply -f -", *after.splitlines()]]
    assert [" ".join(words[1:]) for words in told] == [*CLUSTER_CALLS, CLUSTER_CALLS[0]]

    cluster = CLUSTER.replace("SAID", said).replace("ENDED", ended)
    apply = f'[ "$1" != apply ] || cp {gke_sh.home}/manifest {gke_sh.home}/applied'
    done = gke_sh("doctor", settings=settings, kubectl=f"HOME={gke_sh.home}\n{apply}\n{cluster}")
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith(f"ok    versions  python\nverdict: {said}\n")
    assert "my-run-doctor: no pod yet\n" in done.stdout
    assert "my-run-doctor: Pending ImagePullBackOff\n" in done.stdout
    calls = gke_sh.calls()
    assert sorted(set(calls)) == sorted(CLUSTER_CALLS)
    assert calls[:2] == CLUSTER_CALLS[:2]
    assert calls[-1] == CLUSTER_CALLS[0]
    assert (gke_sh.home / "applied").read_text() == f"{manifest}\n"
    spec = json.loads(manifest.partition("\n")[2])["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 0
    (container,) = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == [
        "lemur", "doctor", "--config", "configs/lemur_7b_pretrain.py", "--workdir", "gs://bucket/run",
        "--config.seed=7",
    ]  # fmt: skip


SMOKE = "SMOKE=(--checkpoint 'gs://bucket/a b' --mesh fsdp=8)\n"
NO_SMOKE = "SMOKE is empty in {}/settings.sh: say which checkpoint and mesh, as for lemur smoke\n"


def test_smoke_of_gke_sh_is_a_set_of_its_own_too(gke_sh):
    settings = "OVERRIDES=(--config.seed=7)\nPOLL_SECONDS=0\n" + SMOKE
    printed = gke_sh("smoke", "--dry-run", settings=settings)
    assert printed.returncode == 0, printed.stderr
    manifest = printed.stdout.partition("<<'MANIFEST'\n")[2].partition("\nMANIFEST\n")[0]
    found = json.loads(manifest.partition("\n")[2])
    assert (found["metadata"]["name"], found["spec"]["failurePolicy"]["maxRestarts"]) == ("my-run-smoke", 0)
    (container,) = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["lemur", "smoke", "--checkpoint", "gs://bucket/a b", "--mesh", "fsdp=8"]
    cluster = CLUSTER.replace("SAID", "tokens differ").replace("ENDED", "Failed")
    done = gke_sh("smoke", settings=settings, kubectl=f"HOME={gke_sh.home}\n{cluster}")
    assert done.returncode == 2, done.stderr
    assert done.stdout.endswith("verdict: tokens differ\n")
    assert gke_sh.calls()[-1] == CLUSTER_CALLS[0].replace("doctor", "smoke")


def test_smoke_of_gke_sh_without_words_is_refused(gke_sh):
    done = gke_sh("smoke")
    assert (done.returncode, gke_sh.calls()) == (2, [])
    assert done.stderr == "gke.sh: " + NO_SMOKE.format(gke_sh.home)


def test_doctor_of_gke_sh_leaves_nothing_behind_when_kubectl_fails(gke_sh):
    done = gke_sh("doctor", kubectl='[ "$1" != get ] || { echo "dial tcp: i/o timeout" >&2; exit 1; }')
    assert (done.returncode, "i/o timeout" in done.stderr) == (1, True)
    assert gke_sh.calls()[-1] == CLUSTER_CALLS[0]


@pytest.mark.parametrize(
    "reason",
    [
        "exceeded quota: tpu, requested: google.com/tpu=64",
        'no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"',
        "Unable to connect to the server: dial tcp: i/o timeout",
    ],
)
def test_refusals_of_kubectl_are_passed_on(gke_sh, reason):
    done = gke_sh("start", kubectl=f"echo '{reason}' >&2; exit 1")
    assert (done.returncode, reason in done.stderr) == (1, True)


@pytest.mark.parametrize("verb", ["start", "doctor", "smoke"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("IMAGE=", "gke.sh: IMAGE is empty"),
        ("SECRETS_FILE=secrets.env", "make a Kubernetes secret of it"),
        ("ACCELERATOR=v4-100", "gke.py: unknown TPU slice"),
        ("SLICES=two", "gke.sh: SLICES is two"),
        ("SLICES=-1", "gke.sh: SLICES is -1"),
        ("unset SMOKE; SMOKE='--checkpoint gs://bucket/run'", "SMOKE=(WORD WORD ...)"),
        ("ENVIRONMENT=(A_FLAG)", "gke.py: --env is 'A_FLAG': it must be NAME=VALUE"),
    ],
)
def test_mistakes_in_the_settings_are_one_line_and_delete_nothing(gke_sh, settings, expected, verb):
    done = gke_sh(verb, settings=SMOKE + settings)
    assert (done.returncode, gke_sh.calls()) == (2, [])
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


def test_unknown_verb_of_gke_sh(gke_sh):
    assert (gke_sh("fly").returncode, gke_sh.calls()) == (2, [])


def test_two_verbs_in_one_call_are_refused(gke_sh, slurm):
    done = gke_sh("delete", "start")
    assert (done.returncode, gke_sh.calls()) == (2, [])
    assert done.stderr == "gke.sh: one verb at a time: delete or start?\n"
    done = slurm("doctor", "start")
    assert (done.returncode, done.stderr) == (2, "slurm.sh: one verb at a time: doctor or start?\n")
    assert not (slurm.home / "arguments").exists()


@pytest.mark.parametrize("verb", ["start", "doctor"])
def test_gke_sh_outside_the_environment_says_so(gke_sh, verb):
    python = gke_sh.home / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # without what is installed
    python.chmod(0o755)
    done = gke_sh(verb, python=str(python))
    assert (done.returncode, gke_sh.calls()) == (2, [])
    assert done.stderr == (
        f"gke.sh: {python} cannot import lemur_jax: activate the environment it is installed in, or set PYTHON\n"
    )


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
    assert done.stdout.startswith("sbatch --nodes=2")
    assert not (slurm.home / "arguments").exists()


@pytest.mark.parametrize("status", [0, 2])
def test_slurm_doctor_looks_at_all_nodes_as_the_run_would_use_them(slurm, status):
    settings = f"RUN=run-{status}\nNODES=3\nOVERRIDES=('--config.a=x y')\nSLURM_FLAGS=(--partition=gpu)\n"
    settings += f"SECRETS_FILE={slurm.home}/secrets.env\n"
    slurm(settings=settings)
    train, asked = ((slurm.home / name).read_text() for name in ("script", "arguments"))
    # Slurm runs the script, with one line of stderr from each of two tasks.
    (slurm.home / "srun").write_text(
        '#!/bin/bash\necho "srun $* $TOKEN"\necho "verdict: so"; echo "verdict: so"\n' + f"exit {status}\n"
    )
    (slurm.home / "srun").chmod(0o755)
    with (slurm.home / "sbatch").open("a") as file:
        file.write(
            "for word; do case $word in --output=*) log=${word#--output=} ;; esac; done\n"
            f'bash {slurm.home}/script >"$log" 2>&1\n'
        )
    log = ROOT / f"run-{status}-doctor.log"
    log.write_text("of an earlier one")
    try:
        done = slurm("doctor", settings=settings)
    finally:
        log.unlink(missing_ok=True)
    words = "--config configs/lemur_7b_pretrain.py --workdir /shared/run --config.a=x y"
    assert done.stdout == f"srun --kill-on-bad-exit=0 lemur doctor {words} hunter2\nverdict: so\n"
    assert done.returncode == status, done.stderr
    given = set((slurm.home / "arguments").read_text().splitlines())
    assert {f"--job-name=run-{status}-doctor", "--no-requeue", "--wait"} <= given
    shared = {"--nodes=3", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu"}
    assert shared <= given & set(asked.splitlines())
    script = (slurm.home / "script").read_text()
    assert "requeue" not in script
    # Up to what srun runs, the two are one.
    assert script.partition("srun")[0] == train.partition("srun")[0]


def test_slurm_doctor_without_a_log_says_what_sbatch_said(slurm):
    (slurm.home / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    done = slurm("doctor")
    assert (done.returncode, done.stderr) == (1, "sbatch: error: invalid partition\n")
    printed = slurm("doctor", "--dry-run").stdout
    assert printed.startswith("sbatch --nodes=2")
    assert "lemur doctor --config" in printed


def test_slurm_smoke_is_submitted_in_the_place_of_the_run(slurm):
    printed = slurm("smoke", "--dry-run", settings=SMOKE).stdout
    assert "--job-name=my-run-smoke --no-requeue --wait --output=my-run-smoke.log" in printed
    assert "\nsrun --kill-on-bad-exit=0 lemur smoke --checkpoint gs://bucket/a\\ b --mesh fsdp=8" in printed
    done = slurm("smoke")
    assert (done.returncode, done.stderr) == (2, "slurm.sh: " + NO_SMOKE.format(slurm.home))
    assert not (slurm.home / "arguments").exists()


def test_slurm_smoke_takes_a_list_of_words(slurm):
    done = slurm("smoke", settings="SMOKE='--checkpoint gs://bucket/run'\n")
    assert (done.returncode, "SMOKE=(WORD WORD ...)" in done.stderr) == (2, True)
    assert not (slurm.home / "arguments").exists()


def test_slurm_without_a_workdir_is_refused(slurm):
    done = slurm(settings="WORKDIR=\n")
    assert (done.returncode, "WORKDIR is empty" in done.stderr) == (2, True)
