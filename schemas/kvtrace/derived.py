"""Tables computed from q, k and lse, for SQL: `cache/derived/`.

Computing them takes about what one pass over all attention maps takes, too long for the end of a
recording. So the first query that names one of them, or a view over them, makes them all; they are
kept as Parquet, deletable at any time, and copied into `trace.duckdb`.

Of a trace that has grown since, requests that did not are left as they are, and of those that only
gained tokens the new queries alone are computed: the same numbers to the last bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from kvtrace import derived_parts
from kvtrace.console import progress
from kvtrace.derived_heads import fitting, save_sums, write_heads
from kvtrace.derived_parts import DIRECTORY, Columns, Commits, Made, Part, PartWriter, read_made
from kvtrace.errors import TraceError
from kvtrace.ranks import NUMBERS_PER_RANK

if TYPE_CHECKING:
    from kvtrace.trace import Trace

#: A request whose last token is among so many of its rank's last is taken to go on.
RECENT_ROWS = 4096


def scans(trace: Path, commits: Commits) -> dict[str, str] | None:
    """SELECT of each derived table; None where they are missing or of another state.

    Parameters
    ----------
    trace : pathlib.Path
        The trace directory; see `held` for how long the files stay.
    commits : mapping of int to int
        By rank; see `database.State`.
    """
    made = read_made(trace / DIRECTORY)
    return made.scans(trace / DIRECTORY) if made.commits == commits else None


@contextmanager
def making(trace: Path) -> Iterator[None]:
    """Be the only one that makes the tables of a trace.

    Raises
    ------
    TraceError
        Where they cannot be written.
    """
    try:
        with derived_parts.making(trace):
            yield
    except OSError as error:
        raise TraceError(
            f"{trace / DIRECTORY} cannot be written ({error.strerror or error}); the tables that a"
            " query of sinks, heads or keys needs are kept there; make it writable, or copy the"
            " trace to where it is"
        ) from error


def make(trace: Trace, commits: Commits) -> None:
    """Compute the tables of a trace, or what they lack; to be called while `making`.

    Parameters
    ----------
    trace : Trace
        Just opened, at the state `commits`.
    commits : mapping of int to int
        By rank.
    """
    folder = trace.path / DIRECTORY
    made = read_made(folder)
    if made.commits == commits:
        return
    states = {one.request: _state(trace, one.request) for one in trace.requests()}
    work = _changed(trace, made, states)
    for part in made.parts:
        part.give_up(set(part.made_of) - set(states))
    # Names are never used again while somebody may read: the number goes up.
    number = 1 + max((int(part.name) for part in made.parts), default=0)
    if work:
        writer = PartWriter(folder, str(number))
        _write(trace, writer, work)
        for part in made.parts:
            part.give_up([one.request for one in work])
        writer.part.made_of |= {one.request: vars(one.state) for one in work}
        made.parts = _absorbed(folder, made.parts, writer)
    made.commits = dict(commits)
    derived_parts.publish_made(folder, made)


@dataclass(frozen=True)
class _State:
    """What the rows of a request in the tables are made of.

    Attributes
    ----------
    tokens : int
        How many.
    rows, keys : str
        Digests of the rows of the request, and of the encoder's that its cross attention reads.
    layers : str
        Digest of the layers that it ran through.
    """

    tokens: int
    rows: str
    keys: str
    layers: str


@dataclass(frozen=True)
class _Work:
    """A request to compute; the folder that has what its first tokens add up to; None: none."""

    request: int
    state: _State
    beginning: Path | None


def _state(trace: Trace, request: int) -> _State:
    rows, layers = trace.request_rows(request), trace.layers_of(request)
    sources = sorted({trace.key_request(spec.layer, request) for spec in layers} - {request})
    keys = [trace.request_rows(source) for source in sources]
    return _State(len(rows), _digest(rows), _digest(*keys), _hash(repr(layers).encode()))


def _digest(*rows: NDArray[np.int64]) -> str:
    return _hash(*(np.ascontiguousarray(one, np.int64).tobytes() for one in rows))


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _changed(trace: Trace, made: Made, states: dict[int, _State]) -> list[_Work]:
    """Requests that the tables lack, or have as they were before."""
    known = made.made_of()
    found = []
    for request, state in states.items():
        part, before = known.get(request, (None, {}))
        if before == vars(state):
            continue
        begun = replace(state, **before) if before else None
        grown = begun is not None and begun == replace(
            state, tokens=begun.tokens, rows=_digest(trace.request_rows(request)[: begun.tokens])
        )
        beginning = trace.path / DIRECTORY / part.name if part and grown else None
        found.append(_Work(request, state, beginning))
    return found


def _write(trace: Trace, writer: PartWriter, work: Sequence[_Work]) -> None:
    for one in work:
        writer.add("request_tokens", _token_columns(trace, one.request))
    pairs = [(one, spec) for one in work for spec in trace.layers_of(one.request)]
    # A thread a head: BLAS's own threads on top of them took fifty times as long.
    with (
        progress("attention of keys and heads") as show,
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        for number, (one, spec) in enumerate(pairs):
            name = f"sums-{one.request}-{spec.layer}.npz"
            keys = len(trace.request_rows(trace.key_request(spec.layer, one.request)))
            file = one.beginning / name if one.beginning else None
            before = fitting(file, spec, one.state.tokens, keys) if file else None
            data = trace.attention_data(spec.layer, one.request, before.rows if before else 0)
            sums = write_heads(writer, one.request, data, before, pool)
            if sums and _goes_on(trace, one.request):
                save_sums(writer.directory / name, sums)
            show((number + 1) / len(pairs))


def _goes_on(trace: Trace, request: int) -> bool:
    """Whether a request may still grow."""
    rank = request // NUMBERS_PER_RANK
    last = int(trace.request_rows(request).max()) - rank * NUMBERS_PER_RANK
    return not trace.closed and last >= trace.store(rank).rows - RECENT_ROWS


def _token_columns(trace: Trace, request: int) -> Columns:
    tokens = trace.tokens(request)
    columns = {name: tokens[name].combine_chunks() for name in tokens.column_names}
    rows = trace.request_rows(request)[: tokens.num_rows]
    return {"request": np.full(len(rows), request), "row": rows, **columns}


def _absorbed(folder: Path, parts: Sequence[Part], writer: PartWriter) -> list[Part]:
    """The parts, without the last ones: those that the new one takes in, being as large."""
    kept = [part for part in parts if part.made_of]
    while kept and kept[-1].live <= 2 * writer.rows:
        writer.absorb(folder, kept.pop())
    return [*kept, writer.close()]
