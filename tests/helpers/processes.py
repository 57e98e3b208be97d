"""Other processes that tests start."""

import subprocess
import sys

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
