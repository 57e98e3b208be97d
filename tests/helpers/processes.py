"""Other processes that tests start."""

import subprocess
import sys
import tempfile

_compiled = tempfile.TemporaryDirectory(prefix="lemur-compiled-")
# Environment of processes that start the same run again and again: what the first has compiled, the others load.
SHARE_PROGRAMS = {
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

HOLD = """
import sys, time
from etils import epath
from lemur_jax.cluster.lock import workdir_lock
with workdir_lock(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold_workdir(workdir):
    """A process that has the workdir's lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process
