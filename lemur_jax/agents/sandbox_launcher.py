"""Runs one command in the sandbox. `sandbox.run` starts this file as a script; it needs the standard library alone.

Reads a request (JSON) from stdin and writes its report (JSON lines) to the file descriptor that the request names.
The processes, outermost first:

  launcher   measures the time, adopts orphans, kills what is left; no longer reachable from inside
  └ child    drops root, enters new namespaces
    └ init   process 1 in them: builds the file system; when it ends, the kernel kills the rest
      └ the command, under resource limits and a seccomp filter

Where the platform forbids namespaces, as most containers do, the child becomes the command itself. Landlock then
restricts files and signals, and a longer seccomp filter refuses sockets and all calls that act on other processes,
on shared kernel objects or on the attributes of files. Neither needs any rights.
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
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
# mount, IPC, host name, process and network namespaces
NAMESPACES = 0x00020000 | 0x08000000 | 0x04000000 | 0x20000000 | 0x40000000
NEW_USER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MS_NOATIME, MS_NODIRATIME, MS_RELATIME, ST_RELATIME = 1024, 2048, 1 << 21, 4096
MNT_DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
# The number of Landlock's file rights (one bit each) from a version of its interface on.
LANDLOCK_RIGHTS = {5: 16, 3: 15, 2: 14, 1: 13}
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
LANDLOCK_SCOPES = 6  # the version that restricts signals too (Linux 6.12)

# Paths of the machine that the sandbox sees, read-only; the interpreter's prefix is added.
SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/sbin", "/usr", "/etc/alternatives", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
BOX = "/box"

# The seccomp filter: system calls by their numbers on (x86-64, aarch64).
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
X32 = 0x40000000  # x86-64's second set of system calls
REFUSED = {  # memory that no limit counts; namespaces; io_uring, whose operations no filter sees; the kernel's keys
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "unshare": (272, 97), "setns": (308, 268),
    "io_uring_setup": (425, 425), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
}  # fmt: skip
REFUSED_WITHOUT_NAMESPACES = {
    "socket": (41, 198), "setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "chmod": (90, None), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "file_setattr": (469, 469),
}  # fmt: skip
UNSUPPORTED_WITHOUT_NAMESPACES = {  # as on a file system without extended attributes
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
}  # fmt: skip
# Report success and do nothing: `sed -i`, `cp` and `touch` call them on files that they have just made.
IGNORED_WITHOUT_NAMESPACES = {"fchmod": (91, 52), "fchown": (93, 55), "utimensat": (280, 88)}
# Refused where an argument has one of these bits: (numbers, which argument, bits).
NEW_NAMESPACE, ANY_OTHER_PROCESS, NOT_A_STREAM = 0x7E020000, 0xFFFFFFFF, 0xE
REFUSED_IF = {"clone": ((56, 220), 0, NEW_NAMESPACE)}
REFUSED_IF_WITHOUT_NAMESPACES = {
    "prlimit64": ((302, 261), 0, ANY_OTHER_PROCESS),
    "sched_setaffinity": ((203, 122), 0, ANY_OTHER_PROCESS), "sched_setparam": ((142, 118), 0, ANY_OTHER_PROCESS),
    "sched_setscheduler": ((144, 119), 0, ANY_OTHER_PROCESS), "sched_setattr": ((314, 274), 0, ANY_OTHER_PROCESS),
    "socketpair": ((53, 199), 1, NOT_A_STREAM),  # a datagram socket can be connected to a path afterwards
}  # fmt: skip
CLONE3 = 435  # the filter cannot see its flags; C libraries fall back to clone


def call(name, *arguments):
    """Calls a function of the C library; OSError if it fails."""
    if getattr(LIBC, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def mount(source, target, kind, flags, options=""):
    call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def prctl(option, value):
    call("prctl", option, value, 0, 0, 0)


def set_limits(limits):
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
    for kind, value in values.items():
        soft, hard = value if isinstance(value, tuple) else (value, value)
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def start(request, directory, isolation, reason, namespaces):
    """Replaces this process by the command, unless the isolation is less than required."""
    refused = request["require_isolation"] and isolation == "limited"
    report(request, isolation=isolation, reason=reason, refused=refused)
    if refused:
        os._exit(125)
    os.chdir(directory)
    for name, text in request["files"].items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    set_limits(request["limits"])
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and that is inherited
        signal.signal(signum, signal.SIG_DFL)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    install_filter(namespaces)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"HOME": directory, "TMPDIR": directory}
    try:
        os.execvpe(request["command"][0], request["command"], environment)
    except (ValueError, OSError) as error:
        # A model's text that cannot be an argument (it has a NUL or 128 KiB) is a command that fails.
        if isinstance(error, OSError) and error.errno != errno.E2BIG:
            raise
        os.write(2, f"cannot run {request['command'][0]}: {error}\n".encode(errors="replace"))
        os._exit(126)


def install_filter(namespaces):
    """Installs the seccomp filter, on processors whose system calls it knows."""
    if platform.machine() not in ARCHITECTURES:
        return
    architecture, column = ARCHITECTURES[platform.machine()]
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, fail = 0x7FFF0000, 0x00050000
    answers = dict.fromkeys(REFUSED.values(), errno.EPERM)
    conditions = dict(REFUSED_IF)
    if not namespaces:
        answers |= dict.fromkeys(REFUSED_WITHOUT_NAMESPACES.values(), errno.EPERM)
        answers |= dict.fromkeys(UNSUPPORTED_WITHOUT_NAMESPACES.values(), errno.EOPNOTSUPP)
        answers |= dict.fromkeys(IGNORED_WITHOUT_NAMESPACES.values(), 0)
        conditions |= REFUSED_IF_WITHOUT_NAMESPACES
    # Lines of (code, lines to skip if true, if false, operand). Architecture is at 4, number at 0, arguments from 16.
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (ret, 0, 0, fail | errno.EPERM)]
    lines.append((load, 0, 0, 0))
    if column == 0:
        lines += [(at_least, 0, 1, X32), (ret, 0, 0, fail | errno.EPERM)]
    lines += [(equal, 0, 1, CLONE3), (ret, 0, 0, fail | errno.ENOSYS)]
    for numbers, code in answers.items():
        if numbers[column] is not None:
            lines += [(equal, 0, 1, numbers[column]), (ret, 0, 0, fail | code)]
    for numbers, argument, bits in conditions.values():
        lines += [(equal, 0, 4, numbers[column]), (load, 0, 0, 16 + 8 * argument), (any_bit, 0, 1, bits)]
        lines += [(ret, 0, 0, fail | errno.EPERM), (ret, 0, 0, allow)]
    lines.append((ret, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
    call("prctl", PR_SET_SECCOMP, 2, program, 0, 0)


def build_root(root, request):
    """Makes `root` the root of the file system: the system read-only, and a writable box."""
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in dict.fromkeys((*SYSTEM, *DEVICES, *request["visible"])):
        target = root + path
        if os.path.islink(path) and path not in request["visible"]:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
        elif os.path.exists(path) and not os.path.exists(target):
            bind(path, target, MS_RDONLY if path not in DEVICES else 0)
    os.mkdir(root + BOX)
    if request["directory"]:
        bind(request["directory"], root + BOX, 0)
    else:
        options = f"size={request['limits']['disk_bytes']},nr_inodes=16384,mode=700"
        mount("tmpfs", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV, options)
        if os.getuid() == 0:
            os.chown(root + BOX, NOBODY, NOBODY)
    os.mkdir(root + "/proc")
    # Containers often forbid mounting /proc; programs work without it.
    with contextlib.suppress(OSError):
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        os.symlink("/proc/self/fd", root + "/dev/fd")  # for Bash's <(command)
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


def enter_sandbox(request):
    """Runs in the child: enters namespaces and forks their init, or without them becomes the command itself."""
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    filtered = platform.machine() in ARCHITECTURES
    try:
        unshare(request)
    except OSError as error:
        give_up_root()
        if user := os.getuid():
            # Here the limit counts all that this user runs already; this process is the sandbox's first.
            request["limits"]["processes"] += threads_of(user) - 1
        directory = request["directory"] or request["root"]
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        complete = restrict_files(request, directory) and filtered
        start(request, directory, "landlock" if complete else "limited", str(error), namespaces=False)
    init = os.fork()
    if init:
        os._exit(exit_code(os.waitpid(init, 0)[1]))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    build_root(request["root"], request)
    child = os.fork()
    if not child:
        if give_up_root():
            with contextlib.suppress(OSError):  # so that only processes of this sandbox are counted
                new_user_namespace()
        start(request, BOX, "namespaces" if filtered else "limited", "unknown processor", namespaces=True)
    while True:
        process, status = os.wait()
        if process == child:
            os._exit(exit_code(status))


def restrict_files(request, box):
    """Landlock: allows `box`, and the system read-only; signals stay inside. Returns whether the kernel can do all."""
    version = LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    all_rights = (1 << next(count for since, count in LANDLOCK_RIGHTS.items() if version >= since)) - 1
    scopes = 3 if version >= LANDLOCK_SCOPES else 0  # abstract sockets, signals
    rules = struct.pack("QQQ", all_rights, 0, scopes)[: 24 if scopes else 8]
    ruleset = LIBC.syscall(LANDLOCK_CREATE_RULESET, rules, len(rules), 0)
    for path in dict.fromkeys((box, *SYSTEM, *DEVICES, *request["visible"])):
        rights = all_rights if path in (box, *DEVICES) else EXECUTE | READ_FILE | READ_DIR
        if not os.path.isdir(path):
            rights &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
        with contextlib.suppress(OSError):  # not there, or not for this user to see
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("syscall", LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
            os.close(descriptor)
    call("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return version >= LANDLOCK_SCOPES


def unshare(request):
    """Enters namespaces: root as it is, every other user through a user namespace."""
    if not request["namespaces"]:
        raise OSError("not wanted")
    if os.getuid() == 0:
        try:
            call("unshare", NAMESPACES)
        except OSError:
            give_up_root()  # root of a container without the capability
            new_user_namespace(NAMESPACES)
    else:
        new_user_namespace(NAMESPACES)
    # Ubuntu 24.04 gives user namespaces without the right to mount: fail here, while there is a fallback.
    mount("", "/", "", MS_REC | MS_PRIVATE)


def new_user_namespace(others=0):
    """Enters a user namespace, with the same user and group inside as outside."""
    user, group = os.getuid(), os.getgid()  # afterwards they read as the overflow ids
    call("unshare", NEW_USER | others)
    lines = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, text in lines.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def give_up_root():
    """Turns root into nobody: the kernel counts no processes for root, and root may do almost anything."""
    if os.getuid() != 0:
        return False
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # reset by the change of user
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


def report(request, **found):
    os.write(request["report"], json.dumps(found).encode() + b"\n")


def children():
    """Processes whose parent is this one, adopted orphans among them."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                pids.append(int(pid))
    return pids


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
    os.set_inheritable(request["report"], False)
    started = time.monotonic()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    child = os.fork()
    if not child:
        try:
            enter_sandbox(request)
        except BaseException as error:
            report(request, failed=f"{type(error).__name__}: {error}")
            os._exit(125)
    for channel in request["channels"]:  # so that the other ends are closed when the command exits
        os.close(channel)

    def expire(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, request["limits"]["wall_seconds"])
    code = None
    try:
        # Orphans may end first, so wait for the child itself.
        code = exit_code(os.waitpid(child, 0)[1])
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        pass
    seconds = time.monotonic() - started
    kill_all()
    report(request, code=code, seconds=seconds)


if __name__ == "__main__":
    main()
