"""`place_tokens`: a recorded run, what a replay kept in the first tier, the rest in the second.

Nothing is forgotten: what the policy evicts moves down, and each decode step fetches those cold
keys that its queries need, uses them for the step, and leaves them where they are. What the numbers
mean: docs/tiers.md.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvtrace.cached import cached_layers, cached_requests
from kvtrace.errors import InputError
from kvtrace.model import Request
from kvtrace.trace import Trace
from kvtrace_viewer.replay.block import Head
from kvtrace_viewer.replay.engine import workers
from kvtrace_viewer.replay.gaps import first_holdings, whole_tokens
from kvtrace_viewer.replay.heads import as_held, heads_of
from kvtrace_viewer.replay.kernels import NEVER, Doubles, Ints, Longs
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.regret import stored_evictions
from kvtrace_viewer.replay.replayable import layers_replayed
from kvtrace_viewer.tiers.fetching import stalls, transfer_ns
from kvtrace_viewer.tiers.hardware import Hardware
from kvtrace_viewer.tiers.options import Options
from kvtrace_viewer.tiers.placement import HeadPlacement, place_head
from kvtrace_viewer.tiers.recorded import number_bytes, recorded_steps
from kvtrace_viewer.tiers.token_result import COLD, HOT, PlacedTokens, TokenResult

#: Order of what a row's attention is split into.
RETAINED, LATE, LOST = range(3)


def place_tokens(
    trace: Trace,
    replay: str,
    hardware: Hardware,
    options: Options | None = None,
    measures: Measures | None = None,
    progress: Callable[[float], None] | None = None,
) -> TokenResult:
    """Place the tokens of a recorded run by a stored replay, and say what each decode step waits.

    Parameters
    ----------
    trace : Trace
        A recording with q and k of its decoded rows.
    replay : str
        A stored result; what it kept is hot.
    hardware : Hardware
        Only the first two tiers are used.
    options : Options, optional
        Of which `mode` and `overlap` are used.
    measures : Measures, optional
        Its `needed_share` says which keys a query needs.
    progress : callable, optional
        Told the share done, 0 to 1.

    Raises
    ------
    InputError
        For an unknown replay, and a trace without steps.
    """
    known = trace.replays()["replay"].to_pylist()
    if replay not in known:
        raise InputError(
            f"replay {replay!r} was not found in {trace.path}; one of {', '.join(known) or 'none'}"
            " was expected; make it with kvtrace replay"
        )
    work = _Work(trace, replay, (measures or Measures()).needed_share)
    cached = set(cached_requests(trace))
    requests = [one for one in trace.requests() if one.request in cached]
    with workers() as pool:
        for done, request in enumerate(requests, start=1):
            work.add_request(request, pool)
            if progress is not None:
                progress(done / len(requests))
    return work.result(hardware, options or Options())


class _Work:
    """Adds up what the heads found, over the steps of the recording and the tokens of requests."""

    def __init__(self, trace: Trace, replay: str, share: float) -> None:
        self.trace = trace
        self.replay = replay
        self.share = share
        self.steps = recorded_steps(trace)
        self.evicted_at = stored_evictions(trace, replay)
        each, note = number_bytes(trace)
        self.notes = [] if note is None else [note]
        layers = trace.layers
        self.num_layers = 1 + max(spec.layer for spec in layers)
        self.slot_bytes = np.zeros(self.num_layers, np.int64)
        for spec in layers:
            self.slot_bytes[spec.layer] = round((spec.head_dim + spec.value_dim) * each)
        shape = (len(self.steps.number), self.num_layers)
        self.fetched, self.evicted, self.made = (np.zeros(shape, np.int64) for _ in range(3))
        # By step and tier: bytes that came, less those that went.
        self.change = np.zeros((shape[0] + 1, 2), np.int64)
        self.rows = np.zeros(shape[0], np.int64)
        self.mass = np.zeros((3, shape[0]))
        self.hits = self.misses = 0
        self.tokens: dict[int, PlacedTokens] = {}

    def add_request(self, request: Request, pool: Executor) -> None:
        """Place one request, layer by layer."""
        layers = _layers(self.trace, request)
        # As far as no gap in the recording stops a replay.
        tokens = whole_tokens(self.trace, request, layers)
        held = first_holdings(self.trace.holdings(request.request), tokens)
        rows = self.trace.request_rows(request.request)[:tokens]
        at = self.steps.of_rows(rows)
        mass = np.zeros((3, len(rows)))
        query_heads = 0
        has_query = np.zeros(len(rows), np.bool_)
        placed = self.tokens[request.request] = PlacedTokens.none(len(rows))
        places = self.trace.places().of(rows)
        for layer in layers:
            data = as_held(self.trace.layer_data(layer, request.request), held)
            heads = heads_of(data, request, num_layers=self.num_layers)
            gone = self.evicted_at[places, layer]
            found = pool.map(partial(_place, gone, self.share), heads)
            for head, one in zip(heads, found, strict=True):
                self._add_head(layer, at, one)
                placed.add(one)
                mass += (one.retained, one.late, one.lost)
                query_heads += head.group
                has_query = head.has_query
        decoded = np.arange(len(rows)) >= min(request.prompt_tokens, len(rows))
        self._add_rows(at, decoded & has_query, mass / max(query_heads, 1))
        if lost := int((decoded & ~has_query).sum()):
            self.notes.append(f"request {request.request}: {lost} decoded rows have no query")

    def _add_head(self, layer: int, at: Longs, one: HeadPlacement) -> None:
        """Add one head's slots; `at` [row] is the step of each row."""
        size = int(self.slot_bytes[layer])
        np.add.at(self.fetched[:, layer], at, one.fetched)
        np.add.at(self.made[:, layer], at, 1)
        cold = one.cold_after != NEVER
        went = at[one.cold_after[cold]]
        np.add.at(self.evicted[:, layer], went, 1)
        left = one.left_after != NEVER
        hot_until = np.minimum(one.cold_after, one.left_after)
        ended = at[-1] + 1
        for tier, begins, ends in (
            (HOT, at, np.where(hot_until == NEVER, ended, at[np.minimum(hot_until, len(at) - 1)])),
            (COLD, went, np.where(left, at[np.minimum(one.left_after, len(at) - 1)], ended)[cold]),
        ):
            np.add.at(self.change[:, tier], begins, size)
            np.add.at(self.change[:, tier], ends, -size)
        self.hits += int(one.hits.sum())
        self.misses += int(one.misses.sum())

    def _add_rows(self, at: Longs, counted: NDArray[np.bool_], mass: Doubles) -> None:
        np.add.at(self.rows, at[counted], 1)
        for kind in range(3):
            np.add.at(self.mass[kind], at[counted], mass[kind, counted])

    def result(self, hardware: Hardware, options: Options) -> TokenResult:
        """What it comes to on a machine."""
        link = hardware.tiers[COLD]
        decodes = np.flatnonzero(self.rows)
        read_ns = transfer_ns(
            self.fetched[decodes] * self.slot_bytes, link.read, round(link.latency * 1e9)
        )
        stall_ns = np.zeros(len(self.rows), np.int64)
        stall_ns[decodes] = stalls(self.steps.duration_ns[decodes], read_ns, options.overlap)
        down = self.made if options.mode == "write-through" else self.evicted
        held = self.change.cumsum(axis=0)[:-1]
        if options.mode == "write-through":
            # Everything lies below, what is hot as a copy.
            held = np.stack([held[:, HOT], held.sum(axis=1)], axis=1)
        with np.errstate(invalid="ignore"):
            mass = self.mass / self.rows
        return TokenResult(
            replay=self.replay,
            hardware=hardware,
            options=options,
            needed_share=self.share,
            steps=self.steps,
            rows=self.rows,
            fetched=self.fetched.sum(axis=1),
            moved_down=down.sum(axis=1),
            bytes_up=self.fetched @ self.slot_bytes,
            bytes_down=down @ self.slot_bytes,
            held=held,
            stall_ns=stall_ns,
            retained=mass[RETAINED],
            late=mass[LATE],
            lost=mass[LOST],
            hits=self.hits,
            misses=self.misses,
            tokens=self.tokens,
            notes=(*self.notes, *self._notes(hardware, held)),
        )

    def _notes(self, hardware: Hardware, held: Longs) -> list[str]:
        found = []
        cold = hardware.tiers[COLD]
        if held[:, COLD].max(initial=0) > cold.capacity:
            found.append(
                f"{cold.name} would have to hold {held[:, COLD].max():,} bytes and has"
                f" {cold.capacity:,}"
            )
        if not self.evicted.any():
            found.append(f"{self.replay} evicted nothing: no token is cold")
        devices = {row["device"] for row in self.trace.table("models").to_pylist()}
        if devices - {"cpu", None}:
            found.append("recorded durations on a GPU are the times to enqueue a step")
        return found


def _layers(trace: Trace, request: Request) -> list[int]:
    """Layers of a request that a replay covers."""
    held = set(layers_replayed(trace, [request.request]))
    return [s.layer for s in cached_layers(trace, [request.request]) if s.layer in held]


def _place(gone: Ints, share: float, head: Head) -> HeadPlacement:
    """Pass over the decoded rows of one head; `gone` [token, kv_head]."""
    return place_head(head, np.ascontiguousarray(gone[:, head.kv_head]), head.prompt_tokens, share)
