"""InterCode: rewards, the wording of errors, a database server and a file tree."""

import contextlib
import json
import math
import os
import pathlib
import select
import shutil
import sqlite3
import subprocess
import sys
import types

import pytest

from lemur_jax.agents import intercode, scratch
from lemur_jax.agents.episodes import open_environments
from lemur_jax.agents.intercode import InterCodeSql, in_mysql_wording, recorded_run, sql_reward
from lemur_jax.agents.intercode_bash import (
    InterCodeBash,
    Outcome,
    bash_reward,
    changes,
    needs,
    open_bash,
    similarity,
)
from lemur_jax.agents.mariadb import MAX_ROWS, connect, server
from lemur_jax.agents.mint import Recorded
from lemur_jax.agents.replay import replay
from lemur_jax.agents.runner import run_episodes
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from tests.helpers.agents import scripted


def test_the_reward_counts_rows_and_their_order():
    pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[agents]'")
    rows = [(1,), (2,), (3,)]
    assert sql_reward(rows, rows) == 1
    assert sql_reward(rows[::-1], rows) == -1
    assert sql_reward(rows[1::-1], rows[:2]) == -1
    assert sql_reward([(1,)], rows) == pytest.approx(1 / 3)
    assert sql_reward([(1,), (1,), (2,)], rows[:2]) == 0.67  # the first of equal rows are compared
    assert sql_reward([], []) == 1
    assert sql_reward("Error executing query: x", rows) == 0


def test_errors_are_worded_as_mysqls():
    assert in_mysql_wording("Unknown column 'x' in 'SELECT'") == "Unknown column 'x' in 'field list'"
    assert in_mysql_wording("Unknown column 'x' in 'IN/ALL/ANY'").endswith(" in 'IN/ALL/ANY subquery'")
    assert in_mysql_wording("('Id', 'int(11)')") == "('Id', 'int')"


def test_another_file_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    for name in ("run.json", "nowhere.json", "."):
        with pytest.raises(UserError, match="is not a recorded run of intercode-sql"):
            recorded_run(tmp_path / name, "sql")


@pytest.mark.parametrize("content", [b"[{", b"{}{}", b'[{"query": ""}]', b"[1]", b'{"a": {}}', b'"\xff"'])
def test_a_damaged_file_of_tasks_is_named(tmp_path, content):
    names = ("nl2bash/nl2bash_fs_1.json", "sql/spider/ic_spider_dev.json", "sql/spider/ic_spider_dbs.sql")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "docker" / "bash_scripts").mkdir(parents=True)
    (tmp_path / "docker" / "bash_scripts" / "setup_nl2b_fs_1.sh").write_text("")
    for kind, file in (("bash", "nl2bash_fs_1.json"), ("sql", "ic_spider_dev.json")):
        with pytest.raises(UserError, match=f"{file} is not a whole file of InterCode's tasks .*: get data/"):
            open_environments([f"intercode-{kind}"], data=str(tmp_path))


needs_server = pytest.mark.skipif(
    shutil.which("mariadbd", path=os.environ["PATH"] + ":/usr/sbin") is None, reason="there is no mariadbd"
)


@needs_server
def test_the_server_ends_with_a_killed_evaluation(tmp_path):
    (tmp_path / "dump.sql").write_text("CREATE DATABASE shop;")
    program = (
        "import pathlib, sys\nfrom lemur_jax.agents.mariadb import server\n"
        "with server(pathlib.Path(sys.argv[1])) as socket: print(socket.parent, flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "dump.sql")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        directory = pathlib.Path(process.stdout.readline().strip())
        (pid,) = (directory / "data").glob("*.pid")
        ended = os.pidfd_open(int(pid.read_text()))
        process.kill()
    assert select.select([ended], [], [], 20)[0]
    os.close(ended)
    shutil.rmtree(directory)


@needs_server
def test_a_question_to_a_server_that_reads_alone_and_is_gone_afterwards(tmp_path):
    pytest.importorskip("pymysql", reason="pymysql is not installed: pip install '.[agents]'")
    pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[agents]'")
    dump = tmp_path / "dump.sql"
    dump.write_text(
        "CREATE DATABASE shop; USE shop; CREATE TABLE item (name TEXT, price INT);"
        " INSERT INTO item VALUES ('a', 3), ('b', 5), ('c', 8);"
    )
    task = {
        "db": "shop",
        "db_tables": {"item": ["name"]},
        "query": "Dear ones?",
        "gold": "SELECT name FROM item WHERE price > 4 ORDER BY price",
    }
    with server(dump) as socket:
        environment = InterCodeSql(0, task, socket)
        assert 'columns: {"item": ["name"]}' in environment.reset()
        steps = [
            environment.step(f"```sql\n{query}\n```")
            for query in (
                "SELECT prize FROM item",
                "DELETE FROM item",
                "KILL USER agent",
                "SELECT 1",  # the connection is lost
                "SELECT 0 FROM item" + "".join(f", item AS i{number}" for number in range(10)),
                "SELECT name FROM item WHERE price > 4",
            )
        ]
        with pytest.raises(UserError, match="no database 'other': .*denied|Unknown database"):
            connect(socket, "other")
        environment.close()
    assert steps[0].observation == "Error executing query: Unknown column 'prize' in 'field list'"
    assert "denied" in steps[1].observation
    assert steps[4].observation.count("(") == MAX_ROWS  # of 3 ** 11
    assert (steps[5].observation, steps[5].reward) == ("[('b',), ('c',)]", 1)
    assert not socket.parent.exists()


def test_no_query_of_the_agent_changes_what_the_solution_finds(monkeypatch):
    """On SQLite in place of the server; there USE and SET do what DROP does here."""
    pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[agents]'")

    class Connection(sqlite3.Connection):
        def cursor(self):
            return contextlib.closing(super().cursor())

    def connect(*_):
        connection = sqlite3.connect(":memory:", factory=Connection)
        connection.executescript("CREATE TABLE item (name TEXT); INSERT INTO item VALUES ('a'), ('b')")
        return connection

    monkeypatch.setitem(sys.modules, "pymysql", types.SimpleNamespace(MySQLError=sqlite3.Error))
    monkeypatch.setattr(intercode, "connect", connect)
    task = {"db": "", "db_tables": {}, "query": "", "gold": "SELECT name FROM item ORDER BY name"}
    environment = InterCodeSql(0, task, pathlib.Path())
    environment.reset()
    queries = ("DROP TABLE item", "SELECT 1 WHERE 0", "SELECT 'a' UNION SELECT 'b' ORDER BY 1")
    assert [environment.step(f"```sql\n{query}\n```").reward for query in queries] == [0, 0, 1]
    environment.close()


@pytest.mark.parametrize("path", ["/testbed/a.txt", "/testbed"])
def test_what_nobody_can_read_is_compared_by_its_name(path, monkeypatch):
    """As after `chmod -R 600`, where box and evaluation are of one user that is not root."""
    script = "mkdir -p /testbed && echo 1 > /testbed/a.txt; cd /testbed; ln -s . loop; ln -s no dangling; mkfifo pipe"
    environment = InterCodeBash("1-0", {"query": "", "gold": f"chmod 0 {path}"}, script)

    def as_user(name, place):
        """A method of paths, where the owner needs rights of `place`."""
        whole = getattr(pathlib.Path, name)

        def method(path):
            if os.stat(place(path)).st_mode & 0o700:
                return whole(path)
            raise PermissionError(path)

        monkeypatch.setattr(pathlib.Path, name, method)

    as_user("read_bytes", lambda path: path)
    as_user("lstat", lambda path: path.parent)
    environment.reset()
    rewards = [environment.step(f"```bash\n{text}\n```").reward for text in ("ls", f"chmod 0 {path}")]
    environment.close()
    assert rewards[0] < rewards[1] == 1


@pytest.mark.process
def test_bash_tasks_in_the_tree_that_a_set_up_script_makes(tmp_path, capsys, caplog):
    gold = {"query": "Copy a.txt", "gold": "cp /testbed/a.txt /testbed/b.txt; cat <(ls /testbed)"}
    (tmp_path / "nl2bash").mkdir()
    with pytest.raises(UserError, match="has no nl2bash/nl2bash_fs_1.json: get data/ of https://github.com"):
        open_environments(["intercode-bash"], data=str(tmp_path))
    for number in range(1, 5):
        (tmp_path / "nl2bash" / f"nl2bash_fs_{number}.json").write_text(json.dumps([gold]))
    with pytest.raises(UserError, match=r"has no docker/bash_scripts/setup_nl2b_fs_1.sh"):
        open_environments(["intercode-bash"], data=str(tmp_path))
    scripts = tmp_path / "docker" / "bash_scripts"
    scripts.mkdir(parents=True)
    for number in range(1, 5):
        (scripts / f"setup_nl2b_fs_{number}.sh").write_text(
            "mkdir -p /testbed/sub /system && echo 1 > /testbed/a.txt && date +%N > /system/stamp"
        )
    environment, *_ = open_bash(str(tmp_path))
    environment.reset()
    commands = ["cd testbed", "cat b.txt", "echo 2 > b.txt", "ln -s sub l; cp a.txt b.txt; ls --hide=l"]
    commands += ["rm l; ls", "ls '"]
    steps = [environment.step(f"```bash\n{command}\n```") for command in commands]
    environment.close()
    assert [step.reward for step in steps[:3]] == pytest.approx([0.39, 0.47, 0.34])
    assert steps[3].reward < 1  # for a link too many
    assert (steps[4].observation, steps[4].reward) == ("a.txt\nb.txt\nsub\n", 1)
    assert "No such file" in steps[1].observation
    run = tmp_path / "run.json"
    seen = ["a.txt\nsub\n", "a.txt\nb.txt\nsub\n"]
    history = {"actions": ["ls /testbed", gold["gold"]], "observations": seen}
    episode = {"environment": "ic_bash", "dataset": "nl2bash_fs_3.json", "task_id": 0, "query": ""}
    episode |= {"turn_history": history, "summary": {"max_reward": 1.0}}
    run.write_text(json.dumps({"0": episode}))
    journal = tmp_path / "agents.json.episodes.jsonl"  # of another evaluation, which was killed
    journal.touch()
    words = ["--data", str(tmp_path), "--replay", str(run), "--json", str(tmp_path / "agents.json")]
    assert main(["eval", "--agents", "intercode-bash", *words]) == 0
    assert "verdicts equal 1/1 (100.00%), observations equal 2/2 (100.00%)" in capsys.readouterr().out
    assert journal.exists()
    assert not caplog.text
    lacking = {"query": "", "gold": "ls | xargs -I {} lemur-nowhere '{}; x' /etc/lemur && curl x"}
    (tmp_path / "nl2bash" / "nl2bash_fs_3.json").write_text(json.dumps([gold, lacking]))
    assert [environment.id for environment in open_bash(str(tmp_path))] == [
        f"intercode-bash/{number}-0" for number in range(1, 5)
    ]
    assert caplog.messages == [
        f"1 of 5 tasks are not scored, as the sandbox has no program or writable path {name}: intercode-bash/3-1"
        for name in ("/etc/lemur", "curl with a network", "lemur-nowhere")
    ]
    unseen = InterCodeBash("4-0", {"query": "", "gold": "''lemur-nowhere"}, "")
    boxes = set(scratch._home().glob("*"))
    caplog.clear()
    why = "intercode-bash/4-0: its solution cannot run here: /bin/bash: line 1: lemur-nowhere: command not found"
    answer = f"```bash\n{gold['gold']}\n```"
    traces = run_episodes([unseen, environment], scripted(answer), max_turns=1, batch=1)
    assert [(trace.id, trace.solved_at) for trace in traces] == [("intercode-bash/1-0", 1)]
    assert caplog.messages[-1] == "not scored: 1 of 2 tasks"
    assert f"not scored: {why}" in caplog.messages
    with pytest.raises(UserError, match="no task can be scored here"):
        run_episodes([unseen], scripted(), max_turns=1)
    episode = Recorded(id=unseen.id, opening="", turns=[("", None)], success=False)
    assert replay([unseen], [episode]) == []
    assert set(scratch._home().glob("*")) == boxes
    assert needs("find . -exec a {} + | xargs -0 b; c=$(dig x) && d `e`") == {
        *("find", "a", "xargs", "b", "dig with a network", "d", "e")
    }
    found = needs("ln /system/a -s / | sed 's/ /g/;s@^@/usr/@' ~/b > /x.tar")
    assert found == {"ln", "sed", "/", "/usr/", "/x.tar"}


def test_the_reward_of_bash_counts_paths_contents_and_words():
    assert similarity("a bb cc", "cc bb") == pytest.approx(1)
    assert similarity("aa bb", "aa cc") == pytest.approx(1 / (1 + (1 + math.log(1.5)) ** 2))
    assert (similarity("", ""), similarity("", "aa")) == (1, 0)
    before = {"t/a": (0, "1"), "t/d/b": (0, "2")}
    after = {"t/a": (0o111, "1"), "t/new/x.py": (0, "3"), "t/y.py": (0, "4")}
    assert changes(before, after) == {("t/a", "M"), ("t/d/b", "D"), ("t/new/", "??"), ("t/y.py", "??")}
    other = after | {"t/y.py": (0, "5")}
    right, wrong = (Outcome(files=files, output="x") for files in (after, other))
    assert bash_reward(before, right, right) == 1
    assert bash_reward(before, wrong, right) == pytest.approx(0.84, abs=0.01)
