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

from lemur_jax.agents import sandbox, scratch, shell
from lemur_jax.agents.sandbox import Limits, run, run_python
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
    if not python or run(["true"], namespaces=request.param).isolation == "limited":
        pytest.skip("no system Python, or neither namespaces nor Landlock")
    return lambda program, *arguments: run(
        [python, "-I", "-S", "main.py", *arguments], files={"main.py": program}, namespaces=request.param
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
    assert box("kill -TERM $$").code == 128 + signal.SIGTERM  # as in a shell


@pytest.mark.parametrize("word", ["a\0b", "\ud83d", "a" * 200_000], ids=["nul", "a lone surrogate", "200 kB"])
def test_words_that_no_program_takes_are_a_failed_command(box, word):
    """A model writes them; the evaluation goes on."""
    found = box(f"echo {word}")
    assert (found.code, found.output) == (126, "")
    assert found.errors.startswith("cannot run sh: ")


def test_python_has_the_standard_library_alone():
    found = run_python("import json, sqlite3, sys; print(json.dumps(sys.argv)); import numpy")
    assert found.output == '["main.py"]\n'
    assert "ModuleNotFoundError: No module named 'numpy'" in found.errors
    assert found.code == 1


def test_cpu_time_and_memory():
    found = run_python("while True: pass", limits=Limits(wall_seconds=10, cpu_seconds=1))
    assert found.code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)
    found = run_python("x = bytearray(10**9); print('got it')", limits=QUICK)
    assert ("MemoryError" in found.errors, found.output) == (True, "")


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


@pytest.mark.parametrize("timed_out", [False, True])
def test_orphans_die(box, timed_out):
    mark = f"3{time.monotonic_ns()}"
    script = f"setsid sleep {mark} & setsid setsid sleep {mark} & sleep 0.2; echo started"
    script += "; while :; do sleep 0.1; done" if timed_out else ""
    found = box(script, limits=Limits(wall_seconds=1.5 if timed_out else 10))
    assert found.output == "started\n"
    assert found.timed_out == timed_out
    assert found.seconds < 3
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


def test_files_outside_are_neither_written_nor_read(isolated, tmp_path):
    open_to_all(tmp_path)
    target = tmp_path / "target"
    target.write_text("before")
    os.chmod(target, 0o666)
    program = f"""
import os
open('inside', 'w').write('fine')
print(open('inside').read())
print(sorted(os.listdir('.')))
for path in ({str(target)!r}, '/usr/x', '/x', '/etc/x', '/tmp/x', '/dev/shm/x', '/proc/sysrq-trigger'):
    for attempt in (lambda: open(path, 'w').write('after'), lambda: os.truncate(path, 0), lambda: os.remove(path)):
        try:
            attempt()
            print('wrote', path)
        except OSError:
            pass
print(open({str(target)!r}).read())
"""
    found = isolated(program)
    assert found.output.split("\n") == ["fine", str(sorted(["inside", "main.py"])), ""]
    assert found.code == 1
    assert "before" not in found.errors
    assert target.read_text() == "before"


def test_files_of_the_user_are_not_there(namespaces):
    program = f"import os; print(os.path.exists({__file__!r}), os.listdir('/box'))"
    assert run_python(program).output == "False ['main.py']\n"


def test_environment(box, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    found = box("env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'")
    assert "HOME=" in found.output
    assert "hunter2" not in found.output


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


def open_to_all(directory):
    """pytest's directories are closed to other users, at a depth that depends on how it is started."""
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
    with pytest.raises(UserError, match="the limit wall_seconds is 0: it must be above 0"):
        Limits(wall_seconds=0)


def test_channels_are_closed_where_the_box_cannot_be_made(monkeypatch):
    """A process that reads the other end would wait forever."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setattr(sandbox, "make_directory", lambda prefix: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        run(["true"], channels=[writing])
    assert os.read(reading, 1) == b""
    os.close(reading)
    monkeypatch.setattr(shell, "interpreter", lambda python: (python, sys.prefix))
    with pytest.raises(OSError, match="no space"):
        shell.Shell({}).run_cell("1")


@pytest.mark.parametrize(
    ("known", "unknown"),
    [("LANDLOCK_SCOPES = 6", "LANDLOCK_SCOPES = 999"), ("ARCHITECTURES = {", "ARCHITECTURES = {} and {")],
)
def test_a_box_without_isolation_is_called_limited(monkeypatch, tmp_path, known, unknown):
    """With rules of the kernel too old for signals, or on a processor that the filter does not know."""
    text = pathlib.Path(sandbox.__file__).with_name("sandbox_launcher.py").read_text()
    assert text.count(known) == 1
    launcher = tmp_path / "launcher.py"
    launcher.write_text(text.replace(known, unknown))
    monkeypatch.setattr(sandbox, "_LAUNCHER", launcher)
    found = run(["true"], namespaces=False)
    assert (found.isolation, found.code) == ("limited", 0)
    ran = tmp_path / "ran"
    ran.mkdir()
    with pytest.raises(UserError, match="no namespaces here"):
        run(["touch", "it"], directory=ran, namespaces=False, require_isolation=True)
    assert not list(ran.iterdir())  # it is refused before it runs


# Each line is tried; what it managed to do is printed. `victim` is a process of the same user outside the box,
# `secret` a file of that user which everybody may read.
ATTACKS = """
import ctypes, os, resource, sys
victim, secret = int(sys.argv[1]), sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
numbers = {'x86_64': (29, 64, 68, 240, 248, 425, 251, 319), 'aarch64': (194, 190, 186, 180, 217, 425, 30, 279)}
shmget, semget, msgget, mq_open, add_key, io_uring, ioprio, memfd = numbers[os.uname().machine]
def system_call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), '')
def memory():
    fd = os.memfd_create('x')
    for _ in range(64): os.write(fd, bytes(1 << 20))
def fork_with(flags):
    process = libc.syscall({'x86_64': 56, 'aarch64': 220}[os.uname().machine], flags | 17, 0, 0, 0, 0)
    if process < 0: raise OSError(ctypes.get_errno(), '')
    if process == 0: os._exit(0)
attempts = {
    'kill': lambda: os.kill(victim, 15),
    'prlimit': lambda: resource.prlimit(victim, resource.RLIMIT_CPU, (1, 1)),
    'nice': lambda: os.setpriority(os.PRIO_PROCESS, victim, 19),
    'affinity': lambda: os.sched_setaffinity(victim, {0}),
    'scheduler': lambda: os.sched_setscheduler(victim, os.SCHED_IDLE, os.sched_param(0)),
    'ioprio': lambda: system_call(ioprio, 1, victim, 3 << 13),
    'chmod': lambda: os.chmod(secret, 0o600),
    'chown': lambda: os.chown(secret, os.getuid(), os.getgid()),
    'xattr': lambda: os.setxattr(secret, 'user.x', b'1'),
    'truncate': lambda: os.truncate(secret, 0),
    'shm': lambda: system_call(shmget, 4711, 4096, 0o1600),
    'sem': lambda: system_call(semget, 4711, 1, 0o1600),
    'msg': lambda: system_call(msgget, 4711, 0o1600),
    'mq': lambda: system_call(mq_open, b'lemur', 0o102, 0o600, 0),
    'key': lambda: system_call(add_key, b'user', b'x', b'1', 1, -3),
    '/dev/shm': lambda: open('/dev/shm/lemur', 'w'),
    'memfd': memory,
    'user namespace': lambda: fork_with(0x10000000),
    'mount namespace': lambda: fork_with(0x00020000),
    'setuid': lambda: os.setuid(0),
    'chroot': lambda: os.chroot('.'),
    'io_uring': lambda: system_call(io_uring, 1, ctypes.create_string_buffer(200)),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name)
    except OSError:
        pass
try: os.utime(secret, (1, 1))  # may be ignored
except OSError: pass
print('end')
"""


def test_nothing_outside_the_box_can_be_changed_slowed_or_left_behind(isolated, tmp_path):
    open_to_all(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("before")
    if os.getuid() == 0:
        os.chown(secret, 65534, 65534)
    victim = subprocess.Popen(["sleep", "60"], **({"user": 65534} if os.getuid() == 0 else {}))

    def state():
        found = secret.stat()
        files = [f"{victim.pid}/limits", *(f"sysvipc/{kind}" for kind in ("shm", "sem", "msg"))]
        texts = [pathlib.Path("/proc", file).read_text() for file in files]
        process = os.getpriority(os.PRIO_PROCESS, victim.pid), os.sched_getaffinity(victim.pid)
        return texts, process, found.st_mode, found.st_uid, found.st_mtime

    try:
        before = state()
        found = isolated(ATTACKS, str(victim.pid), str(secret))
        assert (found.output, found.errors) == ("end\n", "")
        assert state() == before
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_usual_programs_work(box):
    script = "echo hi > x && sed -i s/hi/ho/ x && cp x y && touch z && tar cf a.tar x && mkdir q && tar xf a.tar -C q"
    found = box(f"{script} && cat q/x")
    assert (found.output, found.code) == ("ho\n", 0), found.errors


def test_a_deep_tree_ends_in_a_result_and_leaves_nothing(isolated):
    # Its path is longer than PATH_MAX, 4,096 bytes.
    found = isolated("import os\nfor _ in range(2100): os.mkdir('d'); os.chdir('d')\nprint('made')")
    assert (found.output, found.code) == ("made\n", 0)
    assert not [path for path in scratch._home().glob("box-*") if (path / "d").exists()]


def test_remove_tree():
    # In memory, where removing thousands takes no seconds.
    tree = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    here = os.open(tree, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        here, before = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(before)
    os.close(here)
    (tree / "closed" / "in").mkdir(parents=True)
    (tree / "closed").chmod(0)
    scratch.remove_tree(tree)
    assert not tree.exists()
