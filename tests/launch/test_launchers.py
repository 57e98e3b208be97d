"""GKE through XPK, Slurm and SkyPilot: what each one is given. No cluster is touched."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest
import yaml

from tests.launch.conftest import executable

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = """
RUN=my-run
CONFIG=configs/lemur_7b_pretrain.py
WORKDIR=gs://bucket/run
PROJECT=p
ZONE=z
CLUSTER=c
ACCELERATOR=v4-16
IMAGE=registry/lemur:1
"""
SMOKE = "SMOKE=(--checkpoint 'gs://bucket/a b' --mesh fsdp=8)\n"


@pytest.fixture
def gke(tmp_path):
    """`launch/gke.sh WORDS` with an `xpk` and a `kubectl` that write down their arguments."""
    for name in ("xpk", "kubectl"):
        executable(
            tmp_path / name,
            f'#!/bin/bash\nprintf "%q " {name} "$@" >>{tmp_path}/calls; echo >>{tmp_path}/calls\n',
        )

    def run(*words, settings=""):
        (tmp_path / "settings.sh").write_text(SETTINGS + settings)
        (tmp_path / "calls").write_text("")
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "gke.sh"), *words, "--settings", str(tmp_path / "settings.sh")],
            env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    run.calls = lambda: [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return run


def test_a_run_is_a_workload_that_restarts_after_75_alone(gke):
    settings = "SLICES=2\nPROVISIONING=spot\nENVIRONMENT=('A_FLAG=two words')\nOVERRIDES=(--config.seed=7)\n"
    printed = gke("start", "--dry-run", settings=settings)
    assert (printed.returncode, gke.calls()) == (0, []), printed.stderr
    assert gke("start", settings=settings).returncode == 0
    (call,) = gke.calls()
    assert call == shlex.split(printed.stdout)
    assert call[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v4-16", "--num-slices=2", "--spot"} < set(call)
    assert {"--env=A_FLAG=two words", "--env=LEMUR_JOIN=1"} < set(call)
    assert {"--restart-on-exit-codes=75", "--max-restarts=20"} < set(call)
    command = call[-1].removeprefix("--command=")
    assert shlex.split(command) == [
        *("exec", "lemur", "train", "--config", "configs/lemur_7b_pretrain.py"),
        *("--workdir", "gs://bucket/run", "--config.seed=7"),
    ]


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("smoke", "lemur smoke --checkpoint 'gs://bucket/a b' --mesh fsdp=8"),
        ("doctor", "lemur doctor --config configs/lemur_7b_pretrain.py --workdir gs://bucket/run"),
    ],
)
def test_checks_are_workloads_of_their_own_without_restarts(gke, verb, expected):
    assert gke(verb, settings=SMOKE).returncode == 0
    (call,) = gke.calls()
    assert {f"--workload=my-run-{verb}", "--max-restarts=0"} < set(call)
    assert shlex.split(call[-1].removeprefix("--command=")) == ["exec", *shlex.split(expected)]


def test_the_other_verbs(gke):
    for verb, expected in {
        "status": "xpk workload list --project=p --zone=z --cluster=c",
        "delete": "xpk workload delete --project=p --zone=z --cluster=c --workload=my-run",
    }.items():
        assert gke(verb).returncode == 0
        assert gke.calls() == [expected.split()]


@pytest.mark.parametrize(
    ("words", "settings", "expected"),
    [
        (["start"], "IMAGE=\n", "IMAGE is empty"),
        (["start"], "SLICES=two\n", "SLICES is two"),
        (["start"], "PROVISIONING=reserved\n", "pass --reservation in XPK_FLAGS"),
        (["smoke"], "", "SMOKE is empty"),
        (["smoke"], "SMOKE='--checkpoint x'\n", "write SMOKE=(WORD WORD ...)"),
        (["look"], "", "name one of: start, smoke"),
        (["start", "delete"], "", "one verb at a time"),
        ([], "", "no verb"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(gke, words, settings, expected):
    done = gke(*words, settings=settings)
    assert (done.returncode, gke.calls()) == (2, [])
    assert done.stderr.startswith("gke.sh: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not shutil.which("xpk"), reason="needs xpk (pip install xpk)")
def test_xpk_makes_a_manifest_that_keeps_our_exit_statuses(tmp_path):
    manifest = tmp_path / "manifest.yaml"
    flags = f"XPK_FLAGS=(--skip-validation --dry-run --output-manifest-file={manifest})\n"
    (tmp_path / "settings.sh").write_text(SETTINGS + "ACCELERATOR=v4-128\nZONE=us-central2-b\n" + flags)
    subprocess.run(
        ["bash", "launch/gke.sh", "start", "--settings", str(tmp_path / "settings.sh")],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (job,) = yaml.safe_load(manifest.read_text())["spec"]["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert 75 in rule["onExitCodes"]["values"]
    assert not {1, 2} & set(rule["onExitCodes"]["values"])


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (137, 3, True), (75, 20, False)],
)
def test_slurm_requeues_after_75_and_signals(tmp_path, status, restarts, requeued):
    executable(
        tmp_path / "bin" / "srun", f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/words\nexit {status}\n'
    )
    executable(tmp_path / "bin" / "scontrol", f'#!/bin/bash\necho "$@" >{tmp_path}/requeued\n')
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), "train", "--workdir", "a b"],
        env={**os.environ, **variables, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )
    assert done.returncode == status
    assert (tmp_path / "words").read_text().splitlines() == [
        *("--kill-on-bad-exit=0", "lemur", "train", "--workdir", "a b"),
    ]
    assert (tmp_path / "requeued").exists() == requeued


def test_skypilot_restarts_after_a_lost_host_or_a_kill():
    task = yaml.safe_load((ROOT / "launch" / "gpu.sky.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 134, 137]}


def test_skypilot_starts_one_process_a_machine(tmp_path):
    task = yaml.safe_load((ROOT / "launch" / "gpu.sky.yaml").read_text())
    lemur = tmp_path / ".venv" / "bin" / "lemur"
    executable(
        lemur,
        '#!/bin/bash\nprintf "%s\\n" "$JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID $JAX_NUM_PROCESSES" "$@"\n',
    )
    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        **{**task["envs"], "OVERRIDES": "--config.seed=7"},
    }

    def run(**more):
        return subprocess.run(
            ["bash", "-c", task["run"]],
            cwd=tmp_path,
            env={**os.environ, **variables, **more},
            capture_output=True,
            text=True,
        )

    refused = run()
    assert refused.returncode != 0
    assert "WORKDIR: add --env WORKDIR=" in refused.stderr
    done = run(WORKDIR="gs://b/run")
    words = f"train --config {task['envs']['CONFIG']} --workdir gs://b/run --config.seed=7"
    assert done.stdout.splitlines() == ["10.0.0.1:8476 1 2", *words.split()]
