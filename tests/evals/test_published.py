"""Scores of other harnesses, as `lemur eval --scores` takes them."""

import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.evals.published import parse_scores


def test_scores():
    assert parse_scores("Spider=62.8,DS-1000=0") == {"Spider": 62.8, "DS-1000": 0.0}
    assert parse_scores("") == {}


@pytest.mark.parametrize("text", ["Spider", "Spider=x", "MMLU=50", "Spider=101", "Spider=nan"])
def test_bad_scores(text):
    with pytest.raises(UserError, match="cannot read the score"):
        parse_scores(text)


def test_bad_scores_are_refused_before_a_checkpoint_is_opened(capsys):
    assert main(["eval", "--checkpoint", "nowhere", "--suite", "paper", "--scores", "X=1"]) == 2
    assert "cannot read the score 'X=1'" in capsys.readouterr().err
