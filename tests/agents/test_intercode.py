"""InterCode-SQL's reward, and the wording of errors."""

import shutil

import pytest

from lemur_jax.agents.intercode import InterCodeSql, in_mysql_wording, recorded_sql, sql_reward
from lemur_jax.agents.mariadb import server
from lemur_jax.common.errors import UserError


def test_the_reward_counts_rows_and_their_order():
    pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[agents]'")
    rows = [(1,), (2,), (3,)]
    assert sql_reward(rows, rows) == 1
    assert sql_reward(rows[::-1], rows) == -1
    assert sql_reward([(1,)], rows) == pytest.approx(1 / 3)
    assert sql_reward([], []) == 1
    assert sql_reward("Error executing query: x", rows) == 0


def test_errors_are_worded_as_mysqls():
    assert in_mysql_wording("Unknown column 'x' in 'SELECT'") == "Unknown column 'x' in 'field list'"
    assert in_mysql_wording("('Id', 'int(11)')") == "('Id', 'int')"


def test_another_file_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a recorded run of InterCode-SQL"):
        recorded_sql(tmp_path / "run.json")


@pytest.mark.skipif(
    shutil.which("mariadbd", path="/usr/bin:/usr/sbin") is None, reason="there is no mariadbd"
)
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
        "query": "Dear ones?",
        "gold": "SELECT name FROM item WHERE price > 4 ORDER BY price",
    }
    with server(dump) as socket:
        environment = InterCodeSql(0, task, socket, handicap=False)
        assert "shop" in environment.reset()
        steps = [
            environment.step(f"```sql\n{query}\n```")
            for query in (
                "SELECT prize FROM item",
                "DELETE FROM item",
                "SELECT name FROM item WHERE price > 4",
            )
        ]
        environment.close()
    assert steps[0].observation == "Error executing query: Unknown column 'prize' in 'field list'"
    assert "denied" in steps[1].observation
    assert (steps[2].observation, steps[2].reward) == ("[('b',), ('c',)]", 1)
    assert not socket.parent.exists()
