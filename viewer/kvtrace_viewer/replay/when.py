"""When a policy decides: after the prompt, its chunks, every token, every N."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.trace import Trace

RHYTHMS = "prefill, step, every=N, stream, chunk=N or chunk"


@dataclass(frozen=True)
class When:
    """The rows after which a policy cuts.

    Attributes
    ----------
    kind : str
        `prefill`: once, right after the prompt. `step`: there, and after every decoded token.
        `every`: after every `every` decoded tokens, none at the prompt. `stream`: after every
        token from the first on. `chunk`: after every `every` tokens of the prompt and after its
        last, none while decoding, as a server that prefills in chunks would.
    every : int
        Tokens between two cuts; for `chunk` 0 where the recorded chunks are meant.
    chunk_ends : tuple of int
        For the recorded chunks of one request, their last rows; see `of`.
    """

    kind: str
    every: int = 1
    chunk_ends: tuple[int, ...] = ()

    @property
    def in_prompt(self) -> bool:
        """Whether it cuts before the end of a prompt, whose rows then count."""
        return self.kind in ("stream", "chunk")

    def of(self, trace: Trace, request: int) -> When:
        """The same for one request: its recorded chunks, where these are meant."""
        if self.kind != "chunk" or self.every:
            return self
        return replace(self, chunk_ends=recorded_chunks(trace, request))

    def cuts(self, tokens: int, prompt_tokens: int) -> NDArray[np.int64]:
        """Rows (positions of query tokens) after which a cut is made, ascending."""
        if self.kind == "stream":
            return np.arange(tokens, dtype=np.int64)
        if self.kind == "every":
            return np.arange(prompt_tokens - 1 + self.every, tokens, self.every, dtype=np.int64)
        if self.kind == "chunk":
            regular = np.arange(self.every - 1, prompt_tokens, self.every) if self.every else ()
            ends = np.union1d(np.append(regular, self.chunk_ends), [prompt_tokens - 1])
            return ends[(ends >= 0) & (ends < prompt_tokens)].astype(np.int64)
        last = prompt_tokens if self.kind == "prefill" else tokens
        return np.arange(max(prompt_tokens - 1, 0), last, dtype=np.int64)

    def __str__(self) -> str:
        if self.kind not in ("every", "chunk") or not self.every:
            return self.kind
        return f"{self.kind}={self.every}"


def recorded_chunks(trace: Trace, request: int) -> tuple[int, ...]:
    """Last position of every step that a request came in."""
    rows = trace.table("rows")
    step_of = np.zeros(int(rows["row"].to_numpy().max()) + 1, np.int64)
    step_of[rows["row"].to_numpy()] = rows["step"].to_numpy()
    steps = step_of[trace.request_rows(request)]
    return tuple(np.flatnonzero(np.diff(steps, append=-1)).tolist())


def parse_when(value: str | When) -> When:
    """Read `prefill`, `step`, `every=N`, `stream`, `chunk=N` or `chunk`.

    Raises
    ------
    InputError
        For anything else.
    """
    if isinstance(value, When):
        return value
    if value in ("prefill", "step", "stream"):
        return When(value)
    if value == "chunk":
        return When("chunk", 0)
    kind, _, number = value.partition("=")
    if kind in ("every", "chunk") and number.isdecimal() and int(number) > 0:
        return When(kind, int(number))
    raise InputError(f"--when is {value!r}; expected {RHYTHMS}; write --when step")
