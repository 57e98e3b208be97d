"""launch/worker.sh, really run, with a `lemur` of our own."""

import pathlib
import shutil
import subprocess

import pytest

from tests.launch.conftest import executable

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "worker.sh", tmp_path / "launch")

    def run(*words, **more):
        command = ["bash", str(tmp_path / "launch" / "worker.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)

    def install(script):
        executable(tmp_path / ".venv" / "bin" / "lemur", "#!/bin/bash\n" + script)

    run.install, run.home = install, tmp_path
    return run


def test_worker_says_how_the_run_is(worker):
    assert worker("status").stdout == "absent\n"
    worker.install('echo "$@ $A_FLAG $TOKEN $LEMUR_JOIN"; exit 75')
    assert worker("status").stdout == "ready\n"
    (worker.home / "run.env").write_text("A_FLAG='two words'\n")
    (worker.home / "secrets.env").write_text("TOKEN=hunter2\n")
    worker("run", "train", "--config", "c.py")
    assert worker("status").stdout == "75\n"
    assert "train --config c.py two words hunter2 1" in (worker.home / "run.log").read_text()
    (worker.home / "exit_status").unlink()
    (worker.home / "run.pid").write_text("999999999")
    assert worker("status").stdout == "137\n"


def test_an_environment_that_cannot_be_read_is_an_error_of_the_run_and_no_new_start(worker):
    worker.install("echo never")
    (worker.home / "secrets.env").write_text("TOKEN=hunter two\n")
    assert worker("run", "train").returncode != 0
    assert worker("status").stdout == "2\n"
    log = (worker.home / "run.log").read_text()
    assert "bash cannot read run.env or secrets.env" in log
    assert "never" not in log
    assert "two" not in log


def test_another_process_with_the_number_of_the_run_is_not_the_run(worker):
    worker.install("")
    with subprocess.Popen(["sleep", "60"]) as other:
        (worker.home / "run.pid").write_text(str(other.pid))
        assert worker("status").stdout == "137\n"
        assert worker("stop").returncode == 0
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("verb", ["smoke", "doctor"])
def test_worker_says_how_what_looked_has_ended(worker, verb):
    worker.install('echo "$@ $A_FLAG $LEMUR_JOIN"; exit 2')
    (worker.home / "run.env").write_text("A_FLAG=two\\ words\n")
    done = worker(verb, "--mesh", "fsdp=8")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first == f"{verb} --mesh fsdp=8 two words 1"
    assert last.endswith(f": lemur {verb} ended with 2")


def test_worker_starts_and_stops_a_run(worker):
    worker.install("trap 'echo saving; exit 0' TERM; echo started; while true; do sleep 0.05; done")
    started = worker("start", "train")
    assert started.returncode == 0, started.stderr
    for _ in range(200):
        if worker("status").stdout == "running\n":
            break
    assert worker("start", "train").stdout == "already running\n"
    assert worker("stop").returncode == 0
    for _ in range(200):
        if (status := worker("status").stdout) == "0\n":
            break
    assert status == "0\n"
    assert (worker.home / "run.log").read_text().endswith("started\nsaving\n")


@pytest.fixture
def fakes(tmp_path):
    """Programs that write down how they were called: `fakes("uv", "exit 1")` puts one into a PATH."""
    directory = tmp_path / "fakes"
    calls = tmp_path / "calls"

    def install(name, script=""):
        executable(directory / name, f'#!/bin/bash\necho {name} "$@" >>{calls}\n{script}\n')

    install.environment = {"PATH": f"{directory}:/usr/bin:/bin", "HOME": str(tmp_path / "home")}
    install.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    return install


def test_worker_sets_itself_up_without_root_and_once(worker, fakes, tmp_path):
    uv = tmp_path / "home/.local/bin/uv"
    make_uv = f"""mkdir -p {uv.parent}; cat >{uv} <<'END'
#!/bin/bash
echo uv "$@" >>{tmp_path}/calls
[ "$1" != venv ] || {{ mkdir -p .venv/bin; touch .venv/bin/python; chmod +x .venv/bin/python; }}
END
chmod +x {uv}"""
    fakes("python3", make_uv)
    install = "uv pip install --quiet --python .venv/bin/python --editable .[tpu,int8]"
    first = worker("setup", env=fakes.environment)
    assert first.returncode == 0, first.stderr
    assert fakes.calls() == [
        "python3 -m pip install --quiet --user uv", "uv venv --quiet --python 3.12 .venv", install,
    ]  # fmt: skip
    worker("setup", env=fakes.environment)
    assert fakes.calls()[3:] == [install]
