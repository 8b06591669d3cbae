"""Regret: the attention later paid to what a policy evicted, by query and head.

Computed from q, k and lse like the replay itself, 64 rows at a time, for any number of results in
one pass. The regrets of a result sum to the mass it lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.cached import cached_layers, cached_requests
from kvtrace.layout import JOURNAL
from kvtrace.model import Request
from kvtrace.store import StoreWriter, publish
from kvtrace.trace import Trace
from kvtrace_viewer.replay.block import BLOCK_ROWS, Floats, Head
from kvtrace_viewer.replay.engine import blocks, workers
from kvtrace_viewer.replay.gaps import first_holdings, whole_tokens
from kvtrace_viewer.replay.heads import as_held, heads_of
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.kernels import NEVER, Doubles, Ints, Longs
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.replayable import layers_replayed

WANTS = 4
"""Queries that are kept of each evicted token and query head."""
FOLDER = "regret"
"""Where it lies inside the folder of its replay, and goes with it."""

Columns = dict[str, NDArray[Any]]


@dataclass
class Regrets:
    """The regrets of one result.

    Attributes
    ----------
    regrets, wants : list of columns
        Tables `replay_regrets` and `replay_wants`, head by head.
    """

    regrets: list[Columns] = field(default_factory=list)
    wants: list[Columns] = field(default_factory=list)

    @property
    def total(self) -> float:
        """All regrets: the lost mass, summed over query heads, layers and rows."""
        return float(sum(part["regret"].sum() for part in self.regrets))


def compute_regrets(
    trace: Trace,
    evicted_at: Mapping[str, NDArray[np.int32]],
    measures: Measures | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Regrets]:
    """Find who wanted what was evicted, for several results at once.

    Parameters
    ----------
    trace : Trace
        What was replayed.
    evicted_at : mapping of str to int32 [row, layer, kv_head]
        By the result's id; see `Result.evicted_at`.
    measures : Measures, optional
        Its `needed_share` says from when on a query needs a key.
    progress : callable, optional
        Told the share done, 0 to 1.

    Returns
    -------
    dict of str to Regrets
    """
    share = (measures or Measures()).needed_share
    found = {name: Regrets() for name in evicted_at}
    work = list(_work(trace, evicted_at))
    with workers() as pool:
        for done, (request, layer) in enumerate(work, start=1):
            rows = trace.request_rows(request.request)[: request.tokens]
            places = trace.places().of(rows)
            gone = {name: values[places, layer] for name, values in evicted_at.items()}
            heads = _heads(trace, request, layer)
            passed = pool.map(lambda head: _pass(head, gone, share), heads)  # noqa: B023
            for head, of_result in zip(heads, passed, strict=True):
                for name, regret in of_result.items():
                    found[name].regrets.append(regret.regrets(request.request, head))
                    found[name].wants.append(regret.wants(request.request, head, rows))
            if progress is not None:
                progress(done / len(work))
    return found


def store_regrets(trace: Trace, name: str, found: Regrets) -> None:
    """Keep the regrets of a stored result in its folder, in the place of older ones."""
    place = trace.replay(name).directory
    aside = place / f".{FOLDER}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    writer = StoreWriter(aside)
    for table, parts in (("replay_regrets", found.regrets), ("replay_wants", found.wants)):
        for columns in parts:
            length = len(columns["position"])
            writer.append(table, {"replay": np.full(length, name), **columns})
    writer.close()
    publish(aside, place / FOLDER)


def has_regrets(trace: Trace, name: str) -> bool:
    """Whether the regrets of a stored result were computed."""
    return (trace.replay(name).directory / FOLDER / JOURNAL).exists()


def stored_evictions(trace: Trace, name: str) -> NDArray[np.int32]:
    """`evicted_at [row, layer, kv_head]` of a stored result, -1 for rows that came after it."""
    array = trace.replay(name).array("evicted_at")
    values = array.read(0, array.shape[0])
    now, then = trace.places(), trace.replay_places(name)
    found = np.full((now.rows, *values.shape[1:]), -1, np.int32)
    for rank, count in then.counts.items():
        first = now.first[rank]
        found[first : first + count] = values[then.first[rank] :][:count]
    return found


def _work(
    trace: Trace, evicted_at: Mapping[str, NDArray[np.int32]]
) -> Iterator[tuple[Request, int]]:
    """Requests, as far as they can be replayed, and layers in which something was evicted."""
    cached = set(cached_requests(trace))
    for request in trace.requests():
        if request.request not in cached:
            continue
        held = set(layers_replayed(trace, [request.request]))
        whole = replace(request, tokens=whole_tokens(trace, request, sorted(held)))
        rows = trace.places().of(trace.request_rows(request.request))
        for spec in cached_layers(trace, [request.request]):
            if spec.layer in held and any(
                spec.layer < values.shape[1] and (values[rows, spec.layer] >= 0).any()
                for values in evicted_at.values()
            ):
                yield whole, spec.layer


def _heads(trace: Trace, request: Request, layer: int) -> list[Head]:
    data = trace.layer_data(layer, request.request)
    held = first_holdings(trace.holdings(request.request), request.tokens)
    return heads_of(as_held(data, held), request, num_layers=layer + 1)


@dataclass(eq=False)
class _HeadRegret:
    """What one KV head's evicted tokens were wanted for.

    Attributes
    ----------
    evicted_at : int32 [token], NEVER where held
    regret : float64 [query head, token]; misses : int64 alike
    query : int32 [query head, token, WANTS]; attention : float32 alike, largest first, 0: none
    """

    evicted_at: Ints
    regret: Doubles
    misses: Longs
    query: Ints
    attention: Floats

    @classmethod
    def zeros(cls, group: int, evicted_at: Ints) -> _HeadRegret:
        """Nothing seen yet."""
        shape = (group, len(evicted_at))
        return cls(
            np.where(evicted_at < 0, NEVER, evicted_at).astype(np.int32),
            np.zeros(shape),
            np.zeros(shape, np.int64),
            np.zeros((*shape, WANTS), np.int32),
            np.zeros((*shape, WANTS), np.float32),
        )

    def regrets(self, request: int, head: Head) -> Columns:
        """Columns of table `replay_regrets`."""
        g, position = np.nonzero(self.regret)
        return {
            "request": np.full(len(g), request),
            "layer": np.full(len(g), head.layer),
            "kv_head": np.full(len(g), head.kv_head),
            "q_head": head.kv_head * head.group + g,
            "position": position,
            "evicted_at": self.evicted_at[position],
            "regret": self.regret[g, position],
            "misses": self.misses[g, position],
        }

    def wants(self, request: int, head: Head, rows: Longs) -> Columns:
        """Columns of table `replay_wants`."""
        g, position, place = np.nonzero(self.attention)
        query = self.query[g, position, place]
        return {
            "request": np.full(len(g), request),
            "layer": np.full(len(g), head.layer),
            "q_head": head.kv_head * head.group + g,
            "position": position,
            "query": query,
            "attention": self.attention[g, position, place],
            "row": rows[position],
            "query_row": rows[query],
        }


def _pass(
    head: Head, gone: Mapping[str, NDArray[np.int32]], share: float
) -> dict[str, _HeadRegret]:
    """Pass over the rows of one head; `gone` [token, kv_head] by result."""
    found = {
        name: _HeadRegret.zeros(head.group, np.ascontiguousarray(values[:, head.kv_head]))
        for name, values in gone.items()
        if head.kv_head < values.shape[1] and (values[:, head.kv_head] >= 0).any()
    }
    first = min((int(one.evicted_at.min()) + 1 for one in found.values()), default=head.tokens)
    buffer = np.empty(head.group * BLOCK_ROWS * head.tokens, dtype=np.float32)
    for start, stop in blocks(head):
        if stop <= first:
            continue
        rows = head.rows(start, stop, buffer)
        for one in found.values():
            add_regret(
                rows,
                start,
                one.evicted_at,
                share,
                one.regret,
                one.misses,
                one.query,
                one.attention,
            )
    return found


@jit
def add_regret(
    attention: Floats,
    start: int,
    evicted_at: Ints,
    share: float,
    regret: Doubles,
    misses: Longs,
    wanting: Ints,
    wanted: Floats,
) -> None:
    """Add what the rows of a block pay to keys that were gone by then.

    Parameters
    ----------
    attention : float32 [query head, row, key]
    evicted_at : int32 [token]
    regret, misses [query head, token], wanting, wanted [query head, token, want] : updated
    """
    group, rows, _ = attention.shape
    for g in range(group):
        for r in range(rows):
            query = start + r
            limit = share / (query + 1)
            row = attention[g, r]
            for j in range(query):
                if evicted_at[j] >= query:
                    continue
                regret[g, j] += row[j]
                if row[j] < limit:
                    continue
                misses[g, j] += 1
                at = wanted.shape[2]
                # The largest first; of equal ones the earlier query.
                while at > 0 and row[j] > wanted[g, j, at - 1]:
                    at -= 1
                for place in range(wanted.shape[2] - 1, at, -1):
                    wanted[g, j, place] = wanted[g, j, place - 1]
                    wanting[g, j, place] = wanting[g, j, place - 1]
                if at < wanted.shape[2]:
                    wanted[g, j, at] = row[j]
                    wanting[g, j, at] = query
