"""InterCode-SQL's reward, and the wording of errors."""

import pytest

from lemur_jax.agents.intercode import in_mysql_wording, recorded_sql, sql_reward
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
