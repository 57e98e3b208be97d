"""launch/pod.sh against a `gcloud` that writes down its calls and fails where the test says so.

No cloud is touched: what the real gcloud does with these commands is not tested here.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

DESCRIBE = "queued-resources describe"
STATUS = "worker.sh status"
FINISHED = [
    {"when": DESCRIBE, "out": "ACTIVE", "times": -1},
    {"when": STATUS, "out": "0\n0", "times": -1},
]


def test_a_run_from_nothing_to_finished(pod):
    done = pod("watch", rules=[
        {"when": DESCRIBE, "out": "ERROR: NOT_FOUND: no such thing", "code": 1},
        {"when": DESCRIBE, "out": "WAITING_FOR_RESOURCES", "times": 3},
        {"when": STATUS, "out": "absent\nabsent"},
        {"when": STATUS, "out": "running\nrunning", "times": 2},
        {"when": STATUS, "out": "0\nrunning"},  # host 0 is done a little earlier
        *FINISHED,
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finished: gs://bucket/run" in done.stdout
    assert pod.steps() == ["create", "push", "setup", "start", "delete"]
    (create,) = pod.calls("queued-resources create")
    assert create == [
        "compute", "tpus", "queued-resources", "create", "test-run", "--project=some-project", "--zone=some-zone",
        "--node-id=test-run", "--accelerator-type=v4-16", "--runtime-version=some-image",
    ]  # fmt: skip
    (start,) = pod.calls("worker.sh start")
    assert "--worker=all" in start
    assert start[-1].rstrip() == (
        "--command=bash lemur/launch/worker.sh start train --config configs/lemur_7b_pretrain.py"
        " --workdir gs://bucket/run"
    )


def test_a_preempted_slice_is_replaced_and_the_run_resumed(pod):
    pod.settings("PROVISIONING=spot\n")
    done = pod("watch", rules=[
        {"when": DESCRIBE, "out": "ACTIVE"},
        {"when": STATUS, "out": "running"},
        {"when": DESCRIBE, "out": "SUSPENDED"},
        {"when": DESCRIBE, "out": "NOT_FOUND", "code": 1},
        {"when": DESCRIBE, "out": "ACTIVE"},
        {"when": STATUS, "out": "absent"},
        *FINISHED,
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pod.steps() == ["delete", "create", "push", "setup", "start", "delete"]
    assert "--spot" in pod.calls("queued-resources create")[0]


@pytest.mark.parametrize("step", ["tpu-vm scp", "worker.sh setup", "worker.sh start"])
def test_preemption_in_the_middle_of_setting_up(pod, step):
    done = pod("watch", rules=[
        {"when": DESCRIBE, "out": "ACTIVE"},
        {"when": STATUS, "out": "absent"},
        {"when": step, "out": "ssh: connect: no route to host", "code": 255, "times": 3},
        {"when": DESCRIBE, "out": "FAILED"},
        {"when": DESCRIBE, "out": "NOT_FOUND", "code": 1},
        {"when": STATUS, "out": "absent"},
        *FINISHED,
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "could not set up every worker" in done.stderr
    assert pod.steps()[-6:] == ["delete", "create", "push", "setup", "start", "delete"]


@pytest.mark.process
def test_ssh_that_hangs_is_cut_off(pod):
    pod.settings("SSH_SECONDS=1\nRETRIES=2\n")
    done = pod("setup", rules=[{"when": "worker.sh setup", "hang": True, "times": 2}])
    assert done.returncode == 4
    assert len(pod.calls("worker.sh setup")) == 2


def test_worker_that_stays_away_costs_one_new_slice_and_then_the_run(pod):
    done = pod("watch", rules=[
        {"when": STATUS, "out": "unreachable", "code": 255, "times": -1},
        {"when": DESCRIBE, "out": "ACTIVE", "times": -1},
    ])  # fmt: skip
    assert done.returncode == 4
    assert "a worker cannot be reached, on a new slice either" in done.stderr
    assert "delete" in pod.steps()


@pytest.mark.parametrize(
    ("refusal", "status", "says", "requests"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'T' has been exceeded", 3, "no quota for v4-16 in some-zone", 1),
        ("INVALID_ARGUMENT: unknown accelerator", 2, "unknown accelerator", 1),
        ("There is no more capacity in the zone", 0, "", 2),  # waits for some
    ],
)
def test_a_refused_request_ends_it_unless_capacity_may_come(pod, refusal, status, says, requests):
    absent = {"when": DESCRIBE, "out": "NOT_FOUND", "code": 1, "times": requests}
    done = pod("create", rules=[absent, {"when": "create", "out": refusal, "code": 1}, *FINISHED])
    assert (done.returncode, says in done.stderr) == (status, True)
    assert pod.steps() == ["create"] * requests


@pytest.mark.parametrize("status", ["75\n75", "137\n75", "1\n0"])
def test_crash_is_started_again_without_setting_up(pod, status):
    done = pod("watch", rules=[
        {"when": STATUS, "out": status},
        {"when": STATUS, "out": "running"},
        *FINISHED,
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pod.steps() == ["stop", "start", "delete"]


def test_run_that_crashes_for_ever_is_given_up(pod):
    pod.settings("MAX_RESTARTS=2\n")
    rules = [{"when": STATUS, "out": "1", "times": -1}, {"when": DESCRIBE, "out": "ACTIVE", "times": -1}]
    done = pod("watch", rules=rules)
    assert done.returncode == 5
    assert pod.steps() == ["stop", "start"] * 2  # and the slice is still there to look at


def test_refused_config_is_not_tried_again(pod):
    rules = [{"when": STATUS, "out": "2\n75"}, {"when": DESCRIBE, "out": "ACTIVE", "times": -1}]
    done = pod("watch", rules=rules)
    assert done.returncode == 2
    assert pod.steps() == []


def test_dry_run_prints_what_the_real_run_executes(pod):
    extra = "OVERRIDES=(--config.data.modules=\"('a b',)\")\nENVIRONMENT=('A_FLAG=two words')\n"
    pod.settings(extra)
    pushed = pod("push", "--dry-run").stdout
    assert pod.calls() == []
    assert "git archive --format=tar.gz" in pushed
    pod("push")
    (unpack,) = pod.calls("tar -xzf")
    written = unpack[-1].partition("-C lemur && ")[2].replace(">lemur/run.env", "")
    done = subprocess.run(["bash", "-c", written], capture_output=True, text=True)
    assert done.stdout == "A_FLAG=two\\ words\n"
    printed = [line.split() for line in pushed.splitlines() if line.startswith("timeout")]
    assert [line[2:7] for line in printed] == [["gcloud", *call[:4]] for call in pod.calls()]
    printed = pod("start", "--dry-run")
    assert printed.returncode == 0, printed.stderr
    assert pod.calls() == []
    pod("start")
    (real,) = pod.calls()
    told = subprocess.run(
        [
            "bash",
            "-c",
            f'gcloud() {{ printf "%s\\0" "$@"; }}\ntimeout() {{ shift; "$@"; }}\n{printed.stdout}',
        ],
        capture_output=True,
        text=True,
    )
    assert told.stdout.split("\0")[:-1] == real
    everything = pod("watch", "--dry-run")
    assert everything.returncode == 0, everything.stderr
    assert pod.calls() == []
    assert [word in everything.stdout for word in ("create", "scp", "setup", "start", "delete")] == [True] * 5


def test_several_slices(pod):
    pod.settings("SLICES=2\n")
    pod("create", rules=[{"when": DESCRIBE, "out": "NOT_FOUND", "code": 1}, *FINISHED])
    assert {"--node-prefix=test-run", "--node-count=2"} <= set(pod.calls("create")[0])
    pod("setup")
    assert {call[4] for call in pod.calls("worker.sh setup")} == {"test-run-0", "test-run-1"}


SMOKE = "SMOKE=(--checkpoint 'gs://bucket/a b' --mesh fsdp=8)\n"


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("smoke", "smoke --checkpoint gs://bucket/a\\ b --mesh fsdp=8"),
        ("doctor", "doctor --config configs/lemur_7b_pretrain.py --workdir gs://bucket/run"),
    ],
)
def test_what_looks_at_the_slices_does_so_on_all_at_once(pod, verb, words):
    pod.settings(SMOKE + "SLICES=2\n")
    said = f"all is well\nhost-{{}}: lemur {verb} ended with {{}}"
    rule = {"when": f"worker.sh {verb}", "meet": 2, "times": -1}
    done = pod(verb, rules=[rule | {"out": said.format(1, 0)}])
    assert done.returncode == 0, done.stderr
    assert done.stdout == said.format(1, 0) + "\n"  # and not twice
    calls = pod.calls(f"worker.sh {verb}")
    assert {call[4] for call in calls} == {"test-run-0", "test-run-1"}
    assert {call[-1].rstrip() for call in calls} == {f"--command=bash lemur/launch/worker.sh {words}"}
    # gcloud's own status says nothing of it.
    done = pod(verb, rules=[rule | {"out": said.format(1, 2)}])
    assert done.returncode == 2
    assert f"lemur {verb} ended with 2" in done.stdout
    done = pod(verb, rules=[{"when": "test-run-1", "out": "no route", "code": 255}])
    assert (done.returncode, "no route" in done.stdout) == (4, True)
    assert len(pod.calls()) == 2
    printed = pod(verb, "--dry-run").stdout.splitlines()
    assert [line.split()[7] for line in printed] == ["test-run-0", "test-run-1"]
    assert pod.calls() == []


def test_secrets_go_as_a_file_that_others_cannot_read(pod):
    secrets = pod.home / "secrets.env"
    secrets.write_text("TOKEN=hunter2\n")
    pod.settings(f"SECRETS_FILE={secrets}\n")
    secrets.chmod(0o644)
    assert "others can read" in pod("push").stderr
    secrets.chmod(0o600)
    done = pod("push")
    assert done.returncode == 0, done.stderr
    assert "hunter2" not in done.stdout + done.stderr + json.dumps(pod.calls())
    assert any(str(secrets) in call for call in pod.calls("scp"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("PROJECT=", "PROJECT is empty"),
        ("RUN='My Run'", "RUN is My Run"),
        ("CONFIG=none.py", "there is no file none.py"),
        ("WORKDIR=runs/mine", "WORKDIR is runs/mine: it must be gs://"),  # on a disk that goes with the slice
        ("PROVISIONING=cheap", "PROVISIONING is cheap"),
        ("SLICES=two", "SLICES is two"),
        ("SLICES=0", "SLICES or RETRIES is 0"),
        ("SLICES=", "SLICES is  in"),
        ("SMOKE='--checkpoint gs://bucket/run --mesh fsdp=8'", "SMOKE in"),
        ("OVERRIDES='--config.train.steps=9 --config.seed=3'", "OVERRIDES in"),
        ("ENVIRONMENT='A=1 B=2'", "ENVIRONMENT in"),
        ("ENVIRONMENT=(A_FLAG)", "has A_FLAG: write NAME=value"),
        ("ENVIRONMENT=('A FLAG=1')", "has A FLAG=1: write NAME=value"),
        ("DELETE_WHEN_FINISHED=true", "DELETE_WHEN_FINISHED is true: it must be yes or no"),
        ("RETRIES=0", "RETRIES is 0"),
        ("POLL_SECONDS=1m", "POLL_SECONDS is 1m"),
        ("PROJECT=some-project\r", "has Windows line endings"),
    ],
)
def test_mistakes_in_the_settings(pod, change, expected):
    pod.settings(change + "\n")
    done = pod("create")
    assert (done.returncode, pod.calls()) == (2, [])
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["TOKEN=two words", "TOKEN = spaced", "TOKEN=it's", "TOKEN=a$b", "TOKEN=x\r"]
)
def test_secrets_that_the_workers_could_not_read_are_refused_here(pod, line):
    secrets = pod.home / "secrets.env"
    secrets.write_text(f"{line}\n")
    secrets.chmod(0o600)
    pod.settings(f"SECRETS_FILE={secrets}\n")
    done = pod("push")
    assert (done.returncode, pod.calls()) == (2, [])
    assert str(secrets) in done.stderr
    assert done.stderr.count("\n") == 1
    assert "words" not in done.stderr


def test_a_config_with_an_argument_and_one_that_is_not_committed(pod):
    pod.settings("CONFIG=configs/long_context.py:128k\n")
    assert "--config configs/long_context.py:128k --workdir" in pod("start", "--dry-run").stdout.replace(
        "\\", ""
    )
    config = pod.home / "mine.py"
    config.write_text("")
    pod.settings(f"CONFIG={os.path.relpath(config, ROOT)}\n")
    for verb in ("watch", "push"):
        done = pod(verb)
        assert (done.returncode, pod.calls()) == (2, [])
        assert "mine.py is not committed" in done.stderr
    assert pod("delete").returncode == 0


def test_settings_are_looked_for_where_the_caller_is(pod):
    words = ["bash", str(ROOT / "launch/pod.sh"), "start", "--dry-run", "--settings", "settings.sh"]
    done = subprocess.run(words, cwd=pod.home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gcloud compute tpus tpu-vm ssh test-run" in done.stdout


def test_a_delete_that_deletes_nothing_says_so(pod):
    done = pod("delete", rules=[{"when": "delete", "out": "NOT_FOUND: project some-projekt", "code": 1}])
    assert done.returncode == 0
    assert "some-projekt" in done.stderr
    words = ["/bin/bash", "launch/pod.sh", "delete", "--settings", str(pod.home / "settings.sh")]
    tools = pod.home / "tools"  # what the script needs before it looks for gcloud
    tools.mkdir()
    for name in ("dirname", "grep"):
        os.symlink(shutil.which(name), tools / name)
    done = subprocess.run(words, cwd=ROOT, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "pod.sh: gcloud is not installed\n")


def test_unknown_verb_and_missing_settings(pod):
    assert pod("fly").returncode == 2
    (pod.home / "settings.sh").unlink()
    assert "copy launch/settings.example.sh" in pod("create").stderr


@pytest.mark.parametrize("path", sorted(map(str, ROOT.glob("launch/*.sh"))), ids=os.path.basename)
def test_shellcheck(path):
    shellcheck = shutil.which("shellcheck", path=os.path.dirname(sys.executable)) or shutil.which(
        "shellcheck"
    )
    if shellcheck is None:
        pytest.skip('shellcheck is not installed (pip install -e ".[test]")')
    done = subprocess.run([shellcheck, "-x", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
