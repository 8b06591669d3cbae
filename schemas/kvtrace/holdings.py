"""What a trace holds of a request, where not everything was kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Holdings:
    """What a trace holds of one request.

    Attributes
    ----------
    queries : numpy.ndarray
        [token] of bool: tokens whose q and lse were kept, in all layers.
    prompt_tokens : int
        Tokens of the prompt among them.
    layers : mapping of int to frozenset of str
        By layer, the kinds of row arrays that hold every token of the request (of q and lse:
        every token in `queries`; of received: every token of the prompt).
    """

    queries: Bools
    prompt_tokens: int
    layers: Mapping[int, frozenset[str]]

    @property
    def has_all_queries(self) -> bool:
        """Whether every token's query was kept."""
        return bool(self.queries.all())

    @property
    def last_prompt_queries(self) -> int:
        """How many of the prompt's last tokens have their query, without a hole."""
        missing = np.flatnonzero(~self.queries[: self.prompt_tokens])
        return self.prompt_tokens - (int(missing[-1]) + 1 if len(missing) else 0)

    @property
    def has_decoded_queries(self) -> bool:
        """Whether every token after the prompt has its query."""
        return bool(self.queries[self.prompt_tokens :].all())

    def layers_with(self, *kinds: str) -> list[int]:
        """Layers that hold all of `kinds` for every token, ascending."""
        return sorted(layer for layer, held in self.layers.items() if held.issuperset(kinds))

    @property
    def query_text(self) -> str:
        """Which queries of the prompt were kept: all, none, last=N or every=N."""
        held = np.flatnonzero(self.queries[: self.prompt_tokens])
        if len(held) == self.prompt_tokens:
            return "all"
        if not len(held):
            return "none"
        # --queries every=N keeps positions 0, N, 2N, ... and the last.
        if held[0] == 0 and len(held) > 1 and _is_every(held, self.prompt_tokens):
            return f"every={held[1]}"
        return f"last={self.last_prompt_queries}"


def _is_every(held: Ids, prompt_tokens: int) -> bool:
    multiples = np.arange(0, prompt_tokens, held[1])
    return np.array_equal(held, np.union1d(multiples, [prompt_tokens - 1]))


def first_missing(rows: Ids, is_held: Callable[[int], bool]) -> int | None:
    """The first of some ascending rows that a kind of array does not hold; None where all are.

    What was thinned while recording never comes back, so a bisection finds it.
    """
    if not len(rows) or is_held(int(rows[-1])):
        return None
    low, high = 0, len(rows) - 1
    while low < high:
        middle = (low + high) // 2
        if is_held(int(rows[middle])):
            low = middle + 1
        else:
            high = middle
    return int(rows[low])


def joined(texts: Sequence[str]) -> str:
    """Distinct texts, in order of their first use."""
    return ", ".join(dict.fromkeys(texts))
