"""Evicted tokens that were wanted most, for the command line and the pages."""

from __future__ import annotations

from typing import Any

from kvtrace.trace import Trace


def wanted_tokens(
    trace: Trace, replay: str, count: int = 10, request: int | None = None
) -> list[dict[str, Any]]:
    """Evicted tokens by what was later paid to them, over all layers and heads.

    Parameters
    ----------
    trace : Trace
        With the regrets of `replay` stored.
    replay : str
        Name of the result.
    count : int
        How many, the most wanted first.
    request : int, optional
        Only of this request.

    Returns
    -------
    list of dict
        `request`, `position`, `text`, `evicted_at` (the earliest), `regret`, `misses`, `heads`
        (query heads that needed it), and of the query that wanted it most `query`, `query_text`,
        `layer`, `q_head`, `attention`; these are None where no query needed it.
    """
    name = replay.replace("'", "''")
    chosen = "" if request is None else f"and request = {int(request)}"
    return list(
        trace.sql(
            f"""
            with most as (
                select request, position, min(evicted_at) evicted_at, sum(regret) regret,
                    sum(misses)::bigint misses, count(*) filter (misses > 0) heads
                from replay_regrets where replay = '{name}' {chosen}
                group by all order by regret desc, request, position limit {int(count)}
            ), strongest as (
                select distinct on (request, position) *
                from evicted_but_needed semi join most using (request, position)
                where replay = '{name}'
                order by request, position, attention desc, query, layer, q_head
            )
            select m.*, coalesce(s.text, t.text) as text, s.query, s.query_text, s.layer,
                s.q_head, s.attention
            from most m
            left join strongest s using (request, position)
            left join tokens t on t.request = m.request and t.position = m.position
            qualify row_number() over (partition by m.request, m.position order by t.row desc) = 1
            order by m.regret desc, m.request, m.position
            """
        ).to_pylist()
    )


def query_wants(
    trace: Trace, replay: str, request: int, position: int, count: int = 50
) -> list[dict[str, Any]]:
    """The queries that wanted one evicted token most: rows of view `evicted_but_needed`."""
    name = replay.replace("'", "''")
    return list(
        trace.sql(
            f"""
            select layer, kv_head, q_head, evicted_at, query, query_text, attention, regret, misses
            from evicted_but_needed
            where replay = '{name}' and request = {int(request)} and position = {int(position)}
            order by attention desc, query, layer, q_head limit {int(count)}
            """
        ).to_pylist()
    )
