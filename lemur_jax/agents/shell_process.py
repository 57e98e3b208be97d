"""An IPython shell in the sandbox: runs cells that come as JSON lines on one pipe, answers on another.

    python shell_process.py READ WRITE SECONDS NAMES PATH...

NAMES, e.g. "look();put(object, receptacle)", are functions whose calls the other side of the pipes answers.
PATHs hold IPython and the packages.
"""

import json
import os
import re
import signal
import subprocess
import sys

MAX_CHARACTERS = 2000
GRACE_SECONDS = 10  # for a cell that catches its TimeoutError; then its process ends


def main(reading, writing, seconds, names, *paths):
    sys.path += paths
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils import io
    from traitlets.config import Config

    incoming, dumps, loads = os.fdopen(int(reading), "rb"), json.dumps, json.loads

    def send(message):
        data = dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(int(writing), data) :]

    def ask(name, *arguments):
        remaining = signal.alarm(0)  # waiting for the other side does not count
        send({"call": name, "arguments": list(map(str, arguments))})
        reply = loads(incoming.readline())
        signal.alarm(remaining)
        return reply

    def function(signature):
        name, _, parameters = signature.rstrip(")").partition("(")
        scope = {"ask": ask}
        exec(f"def __call__(self, {parameters}): return ask({name!r}, {parameters})", scope)
        # As in MINT a bound method, which its error messages show.
        return name, scope["__call__"].__get__(ask)

    def expire(*_):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(GRACE_SECONDS)
        raise TimeoutError(f"Timed out after {seconds} seconds.")

    def system(command):
        # IPython's own needs a terminal, which the sandbox does not have; lines end as in a terminal.
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        print(subprocess.run(["/bin/bash", "-c", command], **options).stdout.replace("\n", "\r\n"), end="")

    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(
        user_ns=dict(map(function, filter(None, names.split(";")))), colors="NoColor", config=config
    )
    shell.system = system
    send({"output": ""})  # it has started
    while line := incoming.readline():
        signal.signal(signal.SIGALRM, expire)  # a cell may have set its own
        signal.alarm(int(seconds))
        with io.capture_output() as captured:
            shell.run_cell(loads(line), store_history=True)
        signal.alarm(0)
        output = re.sub(r"File .*main\.py:\d+", "File <hidden_filepath>", captured.stdout)
        if len(output) > MAX_CHARACTERS:
            output = output[:MAX_CHARACTERS] + "...\n[Output Truncated]"
        send({"output": output or "[Executed Successfully with No Output]"})
    os._exit(0)  # also where a cell has left a thread running


if __name__ == "__main__":
    main(*sys.argv[1:])
