"""When a policy decides: after the prompt, after every token, after every N."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError


@dataclass(frozen=True)
class When:
    """The rows after which a policy cuts.

    Attributes
    ----------
    kind : str
        `prefill`: once, right after the prompt. `step`: there, and after every decoded token.
        `every`: after every `every` decoded tokens, none at the prompt. `stream`: after every
        token from the first on.
    every : int
        Decoded tokens between two cuts; only for `every`.
    """

    kind: str
    every: int = 1

    def cuts(self, tokens: int, prompt_tokens: int) -> NDArray[np.int64]:
        """Rows (positions of query tokens) after which a cut is made, ascending."""
        if self.kind == "stream":
            return np.arange(tokens, dtype=np.int64)
        if self.kind == "every":
            return np.arange(prompt_tokens - 1 + self.every, tokens, self.every, dtype=np.int64)
        last = prompt_tokens if self.kind == "prefill" else tokens
        return np.arange(max(prompt_tokens - 1, 0), last, dtype=np.int64)

    def __str__(self) -> str:
        return f"every={self.every}" if self.kind == "every" else self.kind


def parse_when(value: str | When) -> When:
    """Read `prefill`, `step`, `every=N` or `stream`.

    Raises
    ------
    InputError
        For anything else.
    """
    if isinstance(value, When):
        return value
    if value in ("prefill", "step", "stream"):
        return When(value)
    kind, _, number = value.partition("=")
    if kind == "every" and number.isdecimal() and int(number) > 0:
        return When("every", int(number))
    raise InputError(
        f"--when is {value!r}; expected prefill, step, every=N or stream; write --when step"
    )
