import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.data.budget import budget, check_budget, format_budget
from lemur_jax.data.config import StageConfig
from lemur_jax.data.mixture import Mixture
from tests.helpers.fake_rows import source


def test_budget():
    sources = [source("code", 10.0, rows=100, max_epochs=2.0), source("text", 1.0, rows=5, fill=8)]
    # Text rows are half full: 10 : 2 by rows.
    mixture = Mixture(sources, seed=0, batch_rows=12)
    code, text = budget(mixture, steps=20)
    assert (code.rows_required, text.rows_required) == (200, 40)
    assert (code.tokens_required, code.tokens_available) == (3200, 1600)
    assert (text.tokens_required, text.tokens_available) == (320, 40)
    assert (code.epochs, text.epochs) == (2.0, 8.0)
    check_budget([code, text])  # exactly two epochs, and no limit
    table = format_budget([code, text]).splitlines()
    assert table[0].split() == ["source", "share", "tokens", "wanted", "available", "epochs", "allowed"]
    assert table[1].split() == ["code", "90.91%", "3,200", "1,600", "2.00", "2"]
    assert table[2].split() == ["text", "9.09%", "320", "40", "8.00", "any"]
    assert len({len(line) for line in table}) == 1
    with pytest.raises(UserError, match=r"source code: the run needs 3,\d+ tokens.*max_epochs is 2"):
        check_budget(budget(mixture, steps=21))
    assert "2 !" in format_budget(budget(mixture, steps=21))


def test_a_cap_holds_over_all_stages_together():
    sources = [source("code", 1.0, rows=100, max_epochs=1.0), source("text", 1.0, rows=100)]
    anneal = ("anneal", StageConfig(step=8, shares={"code": 3.0, "text": 1.0}))
    mixture = Mixture(sources, seed=0, batch_rows=20, stages=[anneal])
    needs = budget(mixture, steps=9)
    assert [need.rows_required for need in needs] == [80 + 15, 80 + 5]
    check_budget(needs)
    # Neither stage alone needs more than 100 rows of code: both together do.
    with pytest.raises(UserError, match=r"source code: the run needs 1,760 tokens, 1.10 epochs"):
        check_budget(budget(mixture, steps=10))
    header, code, text = format_budget(budget(mixture, steps=12)).splitlines()
    assert header.startswith("source  start, step 0 on  anneal, step 8 on   share  tokens wanted")
    assert code.split()[:5] == ["code", "50.00%", "75.00%", "58.33%", "2,240"]
    assert text.split()[:5] == ["text", "50.00%", "25.00%", "41.67%", "1,600"]
    # A run that ends before the stage begins has none.
    assert "anneal" not in format_budget(budget(mixture, steps=8))
