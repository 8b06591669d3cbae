"""What a recorded run asked of its server: requests, when they came, how long they were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtrace.errors import InputError
from kvtrace.ranks import number_label
from kvtrace.trace import Trace
from kvtrace_viewer.allocation.history import Ints


@dataclass(frozen=True, eq=False)
class Asked:
    """One request.

    Attributes
    ----------
    request : int
        Its number.
    name : str
        What a reader knows it by.
    prompt_tokens, answer_tokens : int
        Of the prompt, and generated; the last generated token is never processed.
    token_ids : int64 [token]
        Those that were processed.
    arrival_step, arrived_ns : int
        The first recorded step that could have processed it, and when it came.
    """

    request: int
    name: str
    prompt_tokens: int
    answer_tokens: int
    token_ids: Ints
    arrival_step: int
    arrived_ns: int

    @property
    def tokens(self) -> int:
        """Tokens that are processed, and cached, in all."""
        return self.prompt_tokens + self.answer_tokens - 1

    def contents(self, block_size: int, known: dict[tuple[int, bytes], int]) -> list[int]:
        """A number for each full block: the same for the same tokens behind the same prefix."""
        parent, found = -1, []
        for start in range(0, len(self.token_ids) - block_size + 1, block_size):
            key = (parent, self.token_ids[start : start + block_size].tobytes())
            parent = known.setdefault(key, len(known))
            found.append(parent)
        return found


@dataclass(frozen=True, eq=False)
class Workload:
    """All requests by their arrival, and how long the recorded steps took.

    Attributes
    ----------
    requests : tuple of Asked
        In the order in which they came.
    started_ns, duration_ns, step_tokens : int64 [step]
        Of the recorded steps.
    bytes_per_token : int
        Keys and values of all layers; 0 where the trace does not say.
    notes : tuple of str
        What must be known to read results.
    """

    requests: tuple[Asked, ...]
    started_ns: Ints
    duration_ns: Ints
    step_tokens: Ints
    bytes_per_token: int
    notes: tuple[str, ...] = ()

    def step_ns(self) -> tuple[float, float]:
        """Nanoseconds of a step, and of each token in it: least squares over the recorded ones."""
        tokens, took = self.step_tokens.astype(float), self.duration_ns.astype(float)
        if len(took) < 2 or np.ptp(tokens) == 0:
            return float(took.mean()) if len(took) else 0.0, 0.0
        slope, base = np.polyfit(tokens, took, 1)
        if slope < 0 or base < 0:
            return float(took.mean()), 0.0
        return float(base), float(slope)


def read_workload(trace: Trace) -> Workload:
    """Read what a recorded run asked.

    Raises
    ------
    InputError
        Where the trace holds no requests with tokens and steps.
    """
    steps = trace.table("steps").sort_by([("started_ns", "ascending"), ("step", "ascending")])
    known = trace.requests()
    if not known or not steps.num_rows:
        raise InputError(
            f"{trace.path} holds no request with its tokens and steps; a recorded run was expected"
            " (kvtrace record, kvtrace generate); of imported workloads and KV events, kvtrace"
            " blocks asks what a cache would have hit"
        )
    started = steps["started_ns"].to_numpy()
    table = trace.table("requests").to_pylist()
    arrived = {row["request"]: row["arrived_ns"] for row in table}
    unknown = 0
    found = []
    for one in known:
        came = arrived.get(one.request)
        if came is None:
            unknown += 1
            came = one.started_ns or int(started[0])
        prompt = max(1, min(one.prompt_tokens or one.tokens, one.tokens))
        found.append(
            Asked(
                request=one.request,
                name=one.external_id or number_label(one.request),
                prompt_tokens=prompt,
                answer_tokens=one.tokens - prompt + 1,
                token_ids=trace.tokens(one.request)["token_id"].to_numpy().astype(np.int64),
                arrival_step=int(np.searchsorted(started, came, side="left")),
                arrived_ns=int(came),
            )
        )
    return Workload(
        requests=tuple(sorted(found, key=lambda one: (one.arrived_ns, one.request))),
        started_ns=started,
        duration_ns=steps["duration_ns"].to_numpy(),
        step_tokens=steps["num_tokens"].to_numpy(),
        bytes_per_token=bytes_per_token(trace),
        notes=_notes(trace, unknown),
    )


def _notes(trace: Trace, unknown: int) -> tuple[str, ...]:
    notes = []
    if unknown:
        notes.append(
            f"{unknown} requests have no recorded arrival and come with their first step: what"
            " they waited before it is not known"
        )
    forks = trace.table("forks").to_pylist()
    children = {f["request"] for f in forks if f["request"] != f["source"]}
    if children:
        notes.append(
            f"requests that began with the cache of another: {len(children)}; here it is found by"
            " its contents, as any prefix, and parallel samples are requests of their own"
        )
    return tuple(notes)


def bytes_per_token(trace: Trace) -> int:
    """Keys and values of a token over all layers, as the recorded cache kept them; 0: unknown."""
    pools = trace.table("kv_pools").to_pylist()
    if pools:
        return sum(row["bytes_per_block"] // row["block_size"] for row in pools)
    grown = trace.sql(
        "select sum(per_token)::bigint n from (select layer, max(bytes / tokens) per_token"
        " from kv_events where event = 'grow' and tokens > 0 group by layer)"
    )
    return int(grown["n"][0].as_py() or 0)
