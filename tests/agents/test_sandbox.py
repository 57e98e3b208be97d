"""The box, and attempts to get out of it."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from lemur_jax.agents import sandbox
from lemur_jax.agents.sandbox import Limits, Result, run, run_python
from lemur_jax.common.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

QUICK = Limits(wall_seconds=3, cpu_seconds=2, memory_bytes=256 << 20, file_bytes=1 << 20, processes=16)


@pytest.fixture(scope="module")
def namespaces():
    """Tests of what namespaces alone can hold are skipped where the platform forbids them."""
    if run(["pwd"]).output != "/box\n":
        pytest.skip("this platform forbids namespaces")


@pytest.fixture(params=[True, False], ids=["namespaces", "plain"])
def box(request):
    """A runner of shell scripts, with namespaces (if the platform has them) and without."""
    return lambda script, **options: run(["sh", "-c", script], namespaces=request.param, **options)


@pytest.fixture(params=[True, False], ids=["namespaces", "plain"])
def isolated(request):
    """A runner of Python programs where the isolation is whole, with namespaces and without."""
    python = shutil.which("python3", path=os.defpath)  # that of the tests may lie where nobody cannot read it
    if not python or not run(["true"], namespaces=request.param).isolated:
        pytest.skip("no system Python, or neither namespaces nor Landlock")
    return lambda program: run(
        [python, "-I", "-S", "main.py"], files={"main.py": program}, namespaces=request.param
    )


def alive(mark: str) -> list[str]:
    """Command lines of the machine's processes that contain the mark."""
    lines = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if mark in line]


def test_output_errors_and_code(box):
    found = box("echo out; echo err >&2; cat data/x; exit 3", files={"data/x": "dáta"})
    assert (found.output, found.errors, found.code) == ("out\ndáta", "err\n", 3)
    assert 0 < found.seconds < 5
    assert not found.timed_out


def test_a_signal_is_counted_as_in_a_shell(box):
    assert box("kill -TERM $$").code == 128 + signal.SIGTERM


def test_python_has_the_standard_library_alone():
    found = run_python("import json, sqlite3, sys; print(json.dumps(sys.argv)); import numpy")
    assert found.output == '["main.py"]\n'
    assert "ModuleNotFoundError: No module named 'numpy'" in found.errors
    assert found.code == 1


def test_infinite_loop(box):
    found = box("while :; do sleep 0.1; done", limits=Limits(wall_seconds=0.5))
    assert found.timed_out
    assert 0.5 <= found.seconds < 3


def test_cpu_time():
    found = run_python("while True: pass", limits=Limits(wall_seconds=10, cpu_seconds=1))
    assert found.code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)


def test_memory_bomb():
    found = run_python("x = bytearray(10**9); print('got it')", limits=QUICK)
    assert "MemoryError" in found.errors
    assert "got it" not in found.output


def test_fork_bomb():
    program = """
import os, time
count = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except OSError as error:
    print(count, type(error).__name__)
"""
    found = run_python(program, limits=QUICK)
    count, error = found.output.split()
    assert (int(count) < 16, error) == (True, "BlockingIOError")


def test_a_fork_bomb_that_goes_on_is_over_with_the_clock(box):
    mark = f"bomb{time.monotonic_ns()}"
    found = box(f"f() {{ f & f; }}; f {mark}", limits=Limits(wall_seconds=1, processes=16))
    assert found.seconds < 4
    assert not alive(mark)


def test_orphans_die(box):
    mark = f"3{time.monotonic_ns()}"
    found = box(f"setsid sleep {mark} & setsid setsid sleep {mark} & sleep 0.2; echo started")
    assert found.output == "started\n"
    assert not alive(mark)


def test_orphans_die_at_the_time_limit_too(box):
    mark = f"4{time.monotonic_ns()}"
    assert box(f"setsid sleep {mark} & sleep 60", limits=Limits(wall_seconds=0.5)).timed_out
    assert not alive(mark)


def test_large_file_and_full_disk(namespaces):
    found = run_python(
        "f = open('x', 'wb')\nfor _ in range(9): f.write(bytes(1 << 20)); f.flush(); print('ok', flush=True)",
        limits=Limits(file_bytes=4 << 20),
    )
    assert (found.output, found.code) == ("ok\n" * 4, 1)
    assert "File too large" in found.errors
    program = "for i in range(20): open(str(i), 'wb').write(bytes(1 << 20))"
    assert "No space left" in run_python(program, limits=Limits(disk_bytes=8 << 20)).errors


def test_endless_output_is_cut(box):
    found = box("yes | head -c 300000", limits=Limits(output_bytes=1000))
    assert len(found.output) < 1100
    assert "299000 bytes left out" in found.output


def test_writing_outside(isolated, tmp_path):
    open_to_all(tmp_path)
    target = tmp_path / "target"
    target.write_text("before")
    os.chmod(target, 0o666)
    program = f"""
import os
open('inside', 'w').write('fine')
print(open('inside').read())
for path in ({str(target)!r}, '/usr/x', '/x', '/etc/x', '/tmp/x', '/dev/shm/x', '/proc/sysrq-trigger'):
    for attempt in (lambda: open(path, 'w').write('after'), lambda: os.truncate(path, 0), lambda: os.remove(path)):
        try:
            attempt()
            print('wrote', path)
        except OSError:
            pass
"""
    assert isolated(program).output == "fine\n"
    assert target.read_text() == "before"


def test_files_of_the_user_cannot_be_read(isolated, tmp_path):
    open_to_all(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    found = isolated(f"import os\nprint(os.listdir('.'))\nprint(open({str(secret)!r}).read())")
    assert found.output == "['main.py']\n"
    assert found.code == 1
    assert "hunter2" not in found.errors


def test_files_of_the_user_are_not_there(namespaces):
    program = f"import os; print(os.path.exists({__file__!r}), os.listdir('/box'))"
    assert run_python(program).output == "False ['main.py']\n"


def test_environment(box, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    found = box("env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'")
    assert "HOME=" in found.output
    assert "hunter2" not in found.output


def test_other_processes_cannot_be_signalled(isolated):
    victim = subprocess.Popen(["sleep", "60"], **({"user": 65534} if os.getuid() == 0 else {}))
    try:
        program = f"""
import os, signal
for process in ({victim.pid}, {os.getpid()}, os.getppid(), -1):
    try:
        os.kill(process, signal.SIGKILL)
    except OSError as error:
        print(type(error).__name__)
print('still here')
"""
        found = isolated(program)
        # With namespaces the parent is 1, the box's own init, of another user if the machine's root runs this.
        assert set(found.output.split("\n")[:2]) <= {"ProcessLookupError", "PermissionError"}
        assert found.output.endswith("still here\n")
        assert found.code == 0
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_no_network(isolated):
    program = """
import errno, socket
for family, kind, address in (
    (socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', 9)),
    (socket.AF_INET, socket.SOCK_STREAM, ('8.8.8.8', 53)),
    (socket.AF_INET, socket.SOCK_DGRAM, ('8.8.8.8', 53)),
):
    try:
        socket.socket(family, kind).connect(address)
    except OSError as error:
        print(error.errno in (errno.ENETUNREACH, errno.EPERM))
one, two = socket.socketpair()
one.send(b'pairs work')
print(two.recv(10).decode())
"""
    assert isolated(program).output == "True\nTrue\nTrue\npairs work\n"


def test_no_way_to_more_rights(isolated):
    program = """
import os
os.mkdir('d')
for attempt in (lambda: os.setuid(0), lambda: os.chroot('d')):
    try:
        attempt()
        print('done')
    except OSError:
        pass
"""
    assert isolated(program).output == ""


def open_to_all(directory):
    """pytest keeps its directories to the user; how deep they lie depends on how it is started."""
    for path in (directory, *directory.parents):
        if path.stat().st_uid == os.getuid() and path.parent != path and not path.stat().st_mode & 0o005:
            path.chmod(0o755)


def test_a_directory_is_kept(box, tmp_path):
    open_to_all(tmp_path)
    directory = tmp_path / "box"
    directory.mkdir()
    box("echo one > file", directory=directory)
    assert box("cat file", directory=directory).output == "one\n"
    assert (directory / "file").read_text() == "one\n"


def test_bad_input():
    with pytest.raises(UserError, match="cannot run no-such-program"):
        run(["no-such-program"])
    with pytest.raises(UserError, match="stay inside the box"):
        run(["true"], files={"../x": ""})


def test_what_a_box_without_isolation_is_called(monkeypatch):
    """With rules of the kernel too old for signals, or of a processor that the filter does not know."""
    text = pathlib.Path(sandbox.__file__).with_name("sandbox_launcher.py").read_text()
    with tempfile.TemporaryDirectory() as directory:
        for known, unknown in (
            ("LANDLOCK_SCOPES = 6", "LANDLOCK_SCOPES = 999"),
            ("SECCOMP = {", "SECCOMP = {} and {"),
        ):
            assert text.count(known) == 1
            launcher = pathlib.Path(directory) / "launcher.py"
            launcher.write_text(text.replace(known, unknown))
            monkeypatch.setattr(sandbox, "_LAUNCHER", launcher)
            assert not run(["true"], namespaces=False).isolated
            with pytest.raises(UserError, match="no namespaces here"):
                run(["true"], namespaces=False, require_isolation=True)


def test_a_result_says_that_it_timed_out():
    assert Result(code=None, output="", errors="", seconds=1.0, isolated=True).timed_out
