"""How attention computes scores: an argument of every implementation."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How a layer computes scores from queries and keys."""

    divisor: float = 0.0  # scores are divided by its root; 0: the head's width N
    softcap: float = 0.0  # c: scores s become c tanh(s / c); 0: none
    window: int = 0  # positions that a query sees, its own included; 0: all before it

    def scale(self, N: int) -> float:
        return (self.divisor or N) ** -0.5

    def hides_keys(self, T: int) -> bool:
        """Whether the window hides anything in a row of T positions."""
        return 0 < self.window < T


PLAIN = ScoreOptions()
