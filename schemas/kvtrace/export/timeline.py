"""When each request of a rank began, began to decode, and ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kvtrace.clocks import RankClock
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace.trace import Trace

#: By step, what it took of each request: its first row there is a prompt's or a decoded token's.
_REQUESTS = """
with taken as (
    select request, step, min(position) first_position, max(position) last_position
    from rows group by all
)
select r.request, r.external_id, r.model, r.prompt_tokens, r.started_ns,
    max(t.last_position) + 1 as tokens,
    min(t.first_position) as shared,
    min(s.started_ns) as first_ns,
    max(s.started_ns + s.duration_ns) as end_ns,
    min(s.started_ns) filter (t.first_position >= r.prompt_tokens) as decode_ns
from requests r join taken t using (request) join steps s using (step)
where s.started_ns is not null
group by all order by r.request
"""


@dataclass(frozen=True)
class RequestTimes:
    """One request; times are of its rank's wall clock.

    Attributes
    ----------
    request, model : int
        Their numbers.
    external_id : str or None
        The serving API's id.
    prompt_tokens, generated_tokens : int
        Tokens that were processed; the last sampled one never is.
    shared_tokens : int
        Tokens of the prompt that another request had computed.
    start_ns, end_ns : int
        When it came (where that is known) or its first step began, and its last step's end.
    decode_ns : int or None
        When the first step after its prompt began; None where there was none.
    """

    request: int
    model: int
    external_id: str | None
    prompt_tokens: int
    generated_tokens: int
    shared_tokens: int
    start_ns: int
    end_ns: int
    decode_ns: int | None

    @property
    def name(self) -> str:
        """What it is called beside the others of its rank."""
        return f"request {self.external_id or self.request % NUMBERS_PER_RANK}"


@dataclass(frozen=True)
class RankTimeline:
    """What one rank did, and when.

    Attributes
    ----------
    rank : int
        The rank.
    run : mapping
        Its row of `runs`.
    clock : RankClock
        Of its times.
    models : mapping of int to str
        Names of its models, by their numbers.
    steps : list of mapping
        Rows of `steps`.
    requests : list of RequestTimes
        Those that were in a step.
    events : pyarrow.Table
        Rows of `kv_events`.
    request_models : mapping of int to int
        The model of each request.
    """

    rank: int
    run: Mapping[str, Any]
    clock: RankClock
    models: Mapping[int, str]
    steps: list[dict[str, Any]]
    requests: list[RequestTimes]
    events: pa.Table
    request_models: Mapping[int, int]

    @property
    def name(self) -> str:
        """The rank, its host and its process."""
        return f"rank {self.rank} ({self.run.get('host')}, pid {self.run.get('pid')})"

    @property
    def step_models(self) -> dict[int, int]:
        """The model of each step."""
        return {step["step"]: step["model"] for step in self.steps}

    @property
    def begin_ns(self) -> int | None:
        """The first moment of all, on the first rank's clock; None where nothing has a time."""
        times = [step["started_ns"] for step in self.steps]
        times += [request.start_ns for request in self.requests]
        times += self.events["ts_ns"].to_pylist()
        known = [time for time in times if time is not None]
        return int(self.clock.align(min(known))) if known else None


def timelines(trace: Trace) -> list[RankTimeline]:
    """Every rank's."""
    found = trace.sql(_REQUESTS).to_pylist()
    clocks = trace.clocks()
    return [
        _timeline(trace, rank, clocks[rank], [x for x in found if _rank(x["request"]) == rank])
        for rank in trace.ranks
    ]


def _timeline(
    trace: Trace, rank: int, clock: RankClock, requests: list[dict[str, Any]]
) -> RankTimeline:
    part = type(trace)(trace.path, rank)
    models = {
        row["model"]: row["name"] or row["architecture"] or f"model {row['model']}"
        for row in part.table("models").to_pylist()
    }
    owners = part.table("requests")
    return RankTimeline(
        rank=rank,
        run=next(iter(part.table("runs").to_pylist()), {}),
        clock=clock,
        models=models,
        steps=part.table("steps").to_pylist(),
        requests=[_times(row) for row in requests],
        events=part.table("kv_events"),
        request_models=dict(
            zip(owners["request"].to_pylist(), owners["model"].to_pylist(), strict=True)
        ),
    )


def _times(row: Mapping[str, Any]) -> RequestTimes:
    prompt = min(row["prompt_tokens"], row["tokens"])
    start = row["first_ns"] if row["started_ns"] is None else row["started_ns"]
    return RequestTimes(
        request=row["request"],
        model=row["model"],
        external_id=row["external_id"],
        prompt_tokens=prompt,
        generated_tokens=row["tokens"] - prompt,
        shared_tokens=min(row["shared"], prompt),
        start_ns=min(start, row["first_ns"]),
        end_ns=row["end_ns"] or row["first_ns"],
        decode_ns=row["decode_ns"],
    )


def _rank(request: int) -> int:
    return request // NUMBERS_PER_RANK
