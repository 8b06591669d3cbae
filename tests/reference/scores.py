"""What a naive policy may look at."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


class Scores:
    """Base: what a score may look at."""

    bound: float | None = None

    def __init__(
        self,
        a: Array,
        outside: Array,
        budget: str,
        cuts: list[int],
        window: int | None,
        head: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.a, self.outside, self.budget, self.cuts = a, outside, budget, cuts
        self.window, self.head, self.options = window, head, options
        self.group, self.tokens, _ = a.shape
        self.start()

    def start(self) -> None:
        """Prepare."""

    def update(self, i: int, kept: list[int]) -> None:
        """See row i, with what is visible to it."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        """See what is held at a cut that will evict."""

    def left(self, held: int, limit: int, is_first: bool) -> int:
        """Tokens that a cut leaves, of more than the budget."""
        return limit

    def read(self, i: int, kept: list[int], limit: int) -> list[int]:
        """What query i reads of what is stored, beside itself."""
        return kept

    def of(self, i: int, j: int) -> float:
        """Score of token j after row i; higher = kept."""
        raise NotImplementedError
