"""InterCode-SQL (Yang et al. 2023): questions about Spider's databases, ten queries each, a reward after each."""

import collections
import contextlib
import itertools
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.agents.environments import Environment, Step, block, find_data
from lemur_jax.agents.mariadb import connect, server
from lemur_jax.agents.mint import Recorded
from lemur_jax.common.errors import UserError

MAX_STEPS = 10
NO_CODE = """No SQL code was found in your last response.

Your response should be a SQL command. Format your SQL command as follows:

```SQL
Your SQL code here
```

Write SQL commands to help you do two things:

1. Learn more about the MySQL Database you are interacting with. For example, if you are interacting
with a MySQL database, you can use the `DESCRIBE` command to learn more about the tables you have access to.
2. Execute SQL commands based on these tables to generate the correct output.

If you have a question, do NOT ask it. Instead, write a SQL command that might help you answer it.
"""
# MariaDB's names of clauses in errors, and MySQL's.
_CLAUSES = {
    "SELECT": "field list",
    "WHERE": "where clause",
    "ON": "on clause",
    "GROUP BY": "group statement",
    "ORDER BY": "order clause",
    "HAVING": "having clause",
    "IN/ALL/ANY": "IN/ALL/ANY subquery",
}
WHERE = "get data/ of https://github.com/princeton-nlp/intercode"


def sql_reward(found: Any, expected: Any) -> float:
    """Intersection over union of the rows as multisets, times Kendall's tau of their order."""
    if not isinstance(found, list) or not isinstance(expected, list):
        return 0.0
    rows, gold = list(map(str, found)), list(map(str, expected))
    shared = collections.Counter(rows) & collections.Counter(gold)
    union = collections.Counter(rows) | collections.Counter(gold)
    if not union:
        return 1.0
    reward = shared.total() / union.total()
    if shared.total() > 1:
        from scipy.stats import kendalltau

        order = {row: rank for rank, row in enumerate(sorted(shared))}
        tau = float(kendalltau(_common(rows, shared, order), _common(gold, shared, order)).statistic)
        if not math.isnan(tau):  # NaN if all rows are equal
            reward = round(tau * reward, 2)
    return reward


def in_mysql_wording(text: str) -> str:
    """MariaDB's results and errors as MySQL 8 words them."""
    text = re.sub(r"\b((?:tiny|small|medium|big)?int)\(\d+\)", r"\1", text)
    text = text.replace("your MariaDB server version", "your MySQL server version")
    text = text.replace("This version of MariaDB doesn't", "This version of MySQL doesn't")
    for mariadb, mysql in _CLAUSES.items():
        text = text.replace(f"' in '{mariadb}'", f"' in '{mysql}'")
        text = text.replace(f"' in {mariadb} is ambiguous", f"' in {mysql} is ambiguous")
    return text


def _common(rows: Sequence[str], shared: Mapping[str, int], order: Mapping[str, int]) -> list[int]:
    """Ranks of the first rows that are in both answers."""
    remaining, ranks = dict(shared), []
    for row in rows:
        if remaining.get(row):
            remaining[row] -= 1
            ranks.append(order[row])
    return ranks


class InterCodeSql(Environment):
    """A question; solved by a query with the rows of the solution, in their order."""

    max_turns = MAX_STEPS
    cumulative_rewards = True

    def __init__(self, number: int, task: Mapping[str, Any], socket: pathlib.Path):
        self.id, self.content = f"intercode-sql/{number}", task
        self._task, self._socket = task, socket
        self._connection: Any = None

    def reset(self) -> str:
        self.close()
        self._connection = connect(self._socket, self._task["db"])
        # Before the agent's first query: USE and SET would change what the solution finds.
        expected = self.execute(self._task["gold"])
        # InterCode treats a solution that fails as one without rows.
        self._expected = [] if isinstance(expected, str) else expected
        return (
            f"Answer a question about the MySQL database {self._task['db']} with queries, one in a ```sql block at a"
            f" time. You see the result and a reward from 0 to 1; you have {MAX_STEPS} queries.\n"
            f"Tables and their columns: {json.dumps(self._task['db_tables'])}\nQuestion: {self._task['query']}"
        )

    def step(self, action: str) -> Step:
        if "```" not in action:
            return Step(observation=NO_CODE, verdict="invalid action")
        rows = self.execute(block(action, "sql", "mysql"))
        reward = sql_reward(rows, self._expected)
        verdict = "passed" if reward == 1 else "execution error" if isinstance(rows, str) else "wrong answer"
        return Step(observation=in_mysql_wording(str(rows)), verdict=verdict, reward=reward)

    def execute(self, query: str) -> Any:
        """The rows, None for a statement without any, or the error as a text."""
        from pymysql import MySQLError

        try:
            with self._connection.cursor() as cursor:
                cursor.execute(query)
                return list(cursor.fetchall()) if cursor.description else None
        except MySQLError as error:
            if not self._connection.open:  # after KILL, which also ends connections of other episodes
                self._connection = connect(self._socket, self._task["db"])
            return f"Error executing query: {error.args[-1] if error.args else error}"

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def open_sql(data: str, stack: contextlib.ExitStack) -> list[InterCodeSql]:
    """The environments with the schema shown ("handicap"), on a server that the stack stops."""
    path, dump = (
        find_data(data, name, WHERE) / name
        for name in ("sql/spider/ic_spider_dev.json", "sql/spider/ic_spider_dbs.sql")
    )
    tasks = read_tasks(path, "query", "gold", "db", "db_tables")
    socket = stack.enter_context(server(dump))
    return [InterCodeSql(index, task, socket) for index, task in enumerate(tasks)]


def read_tasks(path: pathlib.Path, *fields: str) -> list[dict[str, Any]]:
    """The tasks of a file of InterCode; UserError if it is missing or damaged, or one lacks a field."""
    try:
        tasks = json.loads(path.read_bytes())
        for index, field in itertools.product(range(len(tasks)), fields):
            if field not in tasks[index]:
                raise ValueError(f"task {index} lacks {field}")
        return tasks
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a whole file of InterCode's tasks ({error!r}): {WHERE}") from error


def recorded_run(path: pathlib.Path, kind: str) -> list[Recorded]:
    """The episodes of a recorded run of "sql" or "bash", its code in fenced blocks; UserError for another file."""
    try:
        episodes = json.loads(path.read_text(encoding="utf-8")).values()
        return [
            Recorded(
                id=f"intercode-{kind}/{_tree(episode)}{episode['task_id']}",
                opening=episode["query"],
                turns=[
                    (action if "SQL code here" in str(output) else f"```{kind}\n{action}\n```", str(output))
                    for action, output in zip(history["actions"], history["observations"], strict=True)
                ],
                success=episode["summary"]["max_reward"] >= 0.995,
            )
            for episode in episodes
            if episode["environment"] == f"ic_{kind}" and (history := episode["turn_history"])
        ]
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a recorded run of intercode-{kind} ({error!r})") from error


def _tree(episode: Mapping[str, Any]) -> str:
    """The number of a Bash task's file tree, e.g. "2-"."""
    match = re.search(r"nl2bash_fs_(\d)", episode["dataset"])
    return f"{match[1]}-" if match else ""
