"""A temporary MariaDB server, on a socket and without a network."""

import contextlib
import os
import pathlib
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from lemur_jax.agents.scratch import make_directory
from lemur_jax.common.errors import UserError

USER = "agent"
MAX_ROWS = 10_000  # that a query without LIMIT returns; the solutions return up to 1,860
_START_SECONDS = 60.0


@contextlib.contextmanager
def server(dump: pathlib.Path) -> Iterator[pathlib.Path]:
    """Starts a server with the databases of a dump, which the user `agent` may read; yields its socket.

    Raises:
      UserError: there is no server, or it does not start or take the dump.
    """
    if not (program := shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin")):
        raise UserError("InterCode-SQL needs MariaDB's server: apt-get install mariadb-server")
    directory = make_directory("db-")
    launch = ["setpriv", "--pdeathsig=TERM"]  # it ends with this process, even if that is killed
    if os.getuid() == 0:
        shutil.chown(directory, "nobody")
        launch += ["--reuid=nobody", f"--regid={pwd.getpwnam('nobody').pw_gid}", "--clear-groups"]
    socket, log = directory / "socket", directory / "log"
    options = [f"--datadir={directory}/data"]
    process = None
    try:
        with log.open("w") as output:
            streams = {"stdout": output, "stderr": output}
            install = ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal"]
            if subprocess.run([*launch, *install, *options], **streams).returncode:
                raise UserError(f"mariadb-install-db fails: {log.read_text().strip().splitlines()[-1]}")
            options += ["--skip-networking", f"--socket={socket}", f"--secure-file-priv={directory}/data"]
            # As in the recorded runs, table names ignore case. No mode: MariaDB's ONLY_FULL_GROUP_BY refuses
            # queries that MySQL 8 accepts; without it more of the recorded verdicts are reproduced.
            options += ["--sql-mode=", "--lower-case-table-names=1"]
            options += ["--max-statement-time=30", "--skip-log-bin"]
            process = subprocess.Popen([*launch, program, "--no-defaults", *options], **streams)
        _wait(process, socket, log)
        _load(socket, dump)
        yield socket
    finally:
        if process is not None:
            process.terminate()
            process.wait()
        shutil.rmtree(directory)


def _wait(process: subprocess.Popen, socket: pathlib.Path, log: pathlib.Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while subprocess.run(
        ["mariadb-admin", "--no-defaults", "-uroot", f"-S{socket}", "ping"], capture_output=True
    ).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"the database server does not start: {log.read_text().strip().splitlines()[-1]}")
        time.sleep(0.2)


def _load(socket: pathlib.Path, dump: pathlib.Path) -> None:
    text = re.sub(r"utf8mb4_0900_\w+", "utf8mb4_general_ci", dump.read_text(encoding="utf-8"))
    text += f"\nCREATE USER {USER}@localhost;\nGRANT SELECT, SHOW VIEW, SHOW DATABASES ON *.* TO {USER}@localhost;\n"
    command = ["mariadb", "--no-defaults", "-uroot", f"-S{socket}", "--default-character-set=utf8mb4"]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"the server refuses {dump}: {result.stderr.strip()}")


def connect(socket: pathlib.Path, database: str) -> Any:
    """A connection of the user `agent`; UserError without pymysql, or without such a database or server."""
    try:
        import pymysql
    except ImportError as error:
        raise UserError("InterCode-SQL needs a client: pip install 'lemur_jax[agents]'") from error
    options = {"unix_socket": str(socket), "user": USER, "database": database, "charset": "utf8mb4"}
    try:
        return pymysql.connect(**options, init_command=f"SET sql_select_limit={MAX_ROWS}")
    except pymysql.MySQLError as error:
        raise UserError(
            f"the server of InterCode-SQL is gone, or has no database {database!r}: {error}"
        ) from error
