"""Runs one command in a box; started by `sandbox.run` as a script of its own, standard library alone.

Reads a request (JSON) from stdin and writes a verdict (JSON) to the file descriptor that the request
names. Four processes, so that what is inside can never reach whoever watches it:

  launcher   watches the clock, adopts and kills what is left over
  └ porter   gives up root, enters new namespaces
    └ init   process 1 of them: builds the file system, reaps; when it ends the kernel kills the rest
      └ the command, under limits

Where the platform forbids namespaces (most containers do) the porter becomes the command itself, under Landlock,
which holds files and signals, and a seccomp filter, which holds sockets: both need no rights at all.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
import warnings  # noqa: F401  (os.execvpe imports it, where the interpreter's files are out of sight)

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = (
    1,
    4,
    22,
    36,
    38,
)
SECCOMP_MODE_FILTER = 2
# mount, IPC, host name, process and network namespaces
NAMESPACES = 0x00020000 | 0x08000000 | 0x04000000 | 0x20000000 | 0x40000000
NEW_USER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
MS_NOATIME, MS_NODIRATIME, MS_RELATIME, ST_RELATIME = 1024, 2048, 1 << 21, 4096
MNT_DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
# Landlock's file rights, one bit each: the version of its interface that brought the last of them -> how many.
LANDLOCK_RIGHTS = {5: 16, 3: 15, 2: 14, 1: 13}
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
# The version whose rules hold signals too; below it a box without namespaces is not called isolated.
LANDLOCK_SCOPES = 6
# Architecture as seccomp names it, and its numbers of socket and io_uring_setup, which opens sockets as well.
SECCOMP = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
X32 = 0x40000000  # x86-64's second set of system calls

# What a box sees of the machine, read-only; the interpreter's prefix is added.
SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/sbin", "/usr", "/etc/alternatives", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
BOX = "/box"


def call(name, *arguments):
    """A function of the C library; OSError if it fails."""
    if getattr(LIBC, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def mount(source, target, kind, flags, options=""):
    call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def prctl(option, value):
    call("prctl", option, value, 0, 0, 0)


def limit(limits):
    """Sets the resource limits of this process and its children."""
    cpu = max(1, int(limits["cpu_seconds"]))
    values = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in values.items():
        soft, hard = value if isinstance(value, tuple) else (value, value)
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))


def execute(request, directory):
    """Becomes the command."""
    os.chdir(directory)
    for name, text in request["files"].items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    limit(request["limits"])
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and that is inherited
        signal.signal(number, signal.SIG_DFL)
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": directory,
        "TMPDIR": directory,
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    os.execvpe(request["command"][0], request["command"], environment)


def furnish(root, request):
    """Makes `root` the root of the file system: the system read-only, and a writable box of its own."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in dict.fromkeys((*SYSTEM, *DEVICES, *request["visible"])):
        place = root + path
        if os.path.islink(path) and path not in request["visible"]:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.symlink(os.readlink(path), place)
        elif os.path.exists(path) and not os.path.exists(place):
            bind(path, place, MS_RDONLY if path not in DEVICES else 0)
    os.mkdir(root + BOX)
    if request["directory"]:
        bind(request["directory"], root + BOX, 0)
    else:
        options = f"size={request['limits']['disk_bytes']},mode=700"
        mount("tmpfs", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV, options)
        if os.getuid() == 0:
            os.chown(root + BOX, NOBODY, NOBODY)
    os.mkdir(root + "/proc")
    # Containers often forbid a /proc of one's own; programs get along without.
    with contextlib.suppress(OSError):
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    call("syscall", PIVOT_ROOT[platform.machine()], b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    mount("", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def bind(path, place, flags):
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.close(os.open(place, os.O_CREAT))
    # Not recursive: a mount below that could not be made read-only would stay writable.
    mount(path, place, "", MS_BIND)
    if flags:
        # Flags that the machine set on the mount are locked in a user namespace: they have to be kept.
        found = os.statvfs(path).f_flag
        flags |= found & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
        mount("", place, "", MS_REMOUNT | MS_BIND | flags | (MS_RELATIME if found & ST_RELATIME else 0))


def enter(request):
    """The porter: into new namespaces, and there init; or straight to the command where that is forbidden."""
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        unshare(request)
    except OSError as error:
        give_up_root()
        if user := os.getuid():
            # Here the limit counts everything that this user runs already; this process is the box's first.
            request["limits"]["processes"] += threads_of(user) - 1
        box = request["directory"] or request["root"]
        report(request, isolated=confine(request, box), reason=str(error))
        execute(request, box)
    init = os.fork()
    if init:
        os._exit(exit_code(os.waitpid(init, 0)[1]))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    furnish(request["root"], request)
    report(request, isolated=True, reason="")
    child = os.fork()
    if not child:
        if give_up_root():
            with contextlib.suppress(OSError):  # so that processes are counted for this box alone
                new_user_namespace()
        execute(request, BOX)
    while True:
        process, status = os.wait()
        if process == child:
            os._exit(exit_code(status))


def confine(request, box):
    """Without namespaces: the same files within reach, no signals to others, no sockets. Whether all of it holds."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    return all([refuse_sockets(), restrict_files(request, box)])


def restrict_files(request, box):
    """Landlock: the box, and the system read-only; signals stay inside. Whether the kernel can do all of it."""
    version = LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    every = (1 << next(count for since, count in LANDLOCK_RIGHTS.items() if version >= since)) - 1
    scopes = 3 if version >= LANDLOCK_SCOPES else 0  # abstract sockets, signals
    rules = struct.pack("QQQ", every, 0, scopes)[: 24 if scopes else 8]
    ruleset = LIBC.syscall(LANDLOCK_CREATE_RULESET, rules, len(rules), 0)
    for path in dict.fromkeys((box, *SYSTEM, *DEVICES, *request["visible"])):
        rights = every if path in (box, *DEVICES) else EXECUTE | READ_FILE | READ_DIR
        if not os.path.isdir(path):
            rights &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
        with contextlib.suppress(OSError):  # not there, or not for this user to see
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("syscall", LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
            os.close(place)
    call("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return version >= LANDLOCK_SCOPES


def refuse_sockets():
    """A seccomp filter under which no socket can be opened (pairs can). Whether it is in force."""
    if platform.machine() not in SECCOMP:
        return False
    architecture, socket, io_uring = SECCOMP[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    program = [  # code, steps to skip if true and if false, operand; 4 and 0 are where architecture and number lie
        (load, 0, 0, 4), (equal, 0, 5, architecture),
        (load, 0, 0, 0), (equal, 3, 0, socket), (equal, 2, 0, io_uring), (at_least, 1, 0, X32),
        (give, 0, 0, allow), (give, 0, 0, refuse),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    whole = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    return LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, whole, 0, 0) == 0


def unshare(request):
    """Enters namespaces: root of the machine as it is, anybody else as king of a user namespace."""
    if not request["namespaces"]:
        raise OSError("not wanted")
    if os.getuid() == 0:
        try:
            call("unshare", NAMESPACES)
            return
        except OSError:
            give_up_root()  # root of a container without the capability
    new_user_namespace(NAMESPACES)


def new_user_namespace(others=0):
    """A user namespace, with the same user and group inside as outside."""
    user, group = os.getuid(), os.getgid()  # afterwards they read as the overflow ids
    call("unshare", NEW_USER | others)
    lines = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, text in lines.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def give_up_root():
    """Root becomes nobody: the kernel limits no process count of root's, and root may do almost anything."""
    if os.getuid() != 0:
        return False
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # forgotten with the change of user
    prctl(PR_SET_DUMPABLE, 1)  # otherwise /proc/self/uid_map is root's
    return True


def exit_code(status):
    """As a shell counts: 128 + signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def threads_of(user):
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == user:
                count += len(os.listdir(f"/proc/{process}/task"))
    return count


def report(request, **verdict):
    os.write(request["verdict"], json.dumps(verdict).encode() + b"\n")


def children():
    """Processes whose parent is this one, adopted orphans among them."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(process))
    return found


def kill_all():
    """Kills children until none is left; orphans of a killed child become children in turn."""
    while True:
        for process in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main():
    request = json.load(sys.stdin)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.set_inheritable(request["verdict"], False)
    started = time.monotonic()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    porter = os.fork()
    if not porter:
        try:
            enter(request)
        except BaseException as error:
            report(request, failed=f"{type(error).__name__}: {error}")
            os._exit(125)

    def ring(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, request["limits"]["wall_seconds"])
    code = None
    try:
        # Orphans may end first, so it is this one that is waited for.
        code = exit_code(os.waitpid(porter, 0)[1])
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        pass
    seconds = time.monotonic() - started
    kill_all()
    report(request, code=code, seconds=seconds)


if __name__ == "__main__":
    main()
