"""From what a replay gathered to the result of each pair."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace.cached import cached_requests
from kvtrace.model import Request
from kvtrace_viewer.replay.collected import Collected
from kvtrace_viewer.replay.notes import notes
from kvtrace_viewer.replay.rerotation import mean_overlap_and_error
from kvtrace_viewer.replay.result import ReplayedRequest, Result
from kvtrace_viewer.replay.totals import as_mean
from kvtrace_viewer.replay.when import When


def summed_up(gathered: Collected, p: int) -> Result:
    """Make the result of pair `p`, once every request was added."""
    pair, total = gathered.pairs[p], gathered.total
    masses = int(total.masses[p])
    overlap, error = mean_overlap_and_error(gathered.rerotated.values(), p)
    if gathered.ropes is None and total.errors[p]:
        error = float(total.error[p] / total.errors[p])
    return Result(
        id=pair.id + ("-rerotated" if gathered.ropes is not None else "") + _chosen(gathered),
        policy=pair.spec,
        parameters=pair.policy.parameters(),
        budget=str(pair.budget),
        when=str(pair.when),
        exactness=pair.policy.exactness(pair.when),
        tokens=sum(len(rows) for _, rows in gathered.replayed.values()),
        measured_rows=sum(int((s.masses[p] > 0).sum()) for s in gathered.steps.values()),
        hits=int(total.hits[p]),
        misses=int(total.misses[p]),
        evictions=int(total.evictions[p]),
        sinks=total.sinks,
        retained_sinks=int(total.retained_sinks[p]),
        retained_mass=float(total.mass[p] / masses) if masses else None,
        mass_p5=total.p5(p),
        mass_worst=float(total.worst[p]) if masses else None,
        rerotate=gathered.ropes is not None,
        overlap=overlap,
        output_error=error,
        output_rows=int(total.error_rows[p]) // len(gathered.totals),
        ties=int(total.ties[p]),
        bound=total.mean_bound(p),
        bound_layer=as_mean(sum(x[p] for x in gathered.moving.of_layers.values()), masses),
        bound_model=as_mean(gathered.moving.of_model[p], masses),
        bound_scope=None if gathered.moving.beyond[p] else pair.policy.bound_scope,
        left_out=tuple(gathered.left_out),
        notes=notes(gathered, pair),
        evicted_at=gathered.evicted_at[p],
        reads=gathered.reads[p],
        selects=pair.policy.selects,
        places=gathered.places,
        steps=_steps(gathered, p),
        heads=_heads(gathered, p),
        requests={
            number: ReplayedRequest(rows, _last_cut(gathered.rhythm(pair, request), request))
            for number, (request, rows) in gathered.replayed.items()
        },
        kv_heads=gathered.kv_heads,
    )


def _chosen(gathered: Collected) -> str:
    """What sets a replay of some requests apart from one of all."""
    if set(gathered.replayed) == set(cached_requests(gathered.trace)):
        return ""
    return "-request=" + ".".join(map(str, gathered.replayed))


def _steps(gathered: Collected, p: int) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
    parts = []
    for number, s in gathered.steps.items():
        at = np.flatnonzero(s.masses[p])
        mass = s.mass[p, at] / s.masses[p, at]
        counts = (s.hits[p, at], s.misses[p, at], s.evictions[p, at], s.held[p, at])
        parts.append((np.full(len(at), number), at, mass, s.worst[p, at], *counts))
    names = ["request", "position", "mass", "mass_worst", "hits", "misses", "evictions", "held"]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return dict(zip(names, columns, strict=True))


def _heads(gathered: Collected, p: int) -> dict[str, list[object]]:
    rows: list[dict[str, object]] = []
    masses: dict[int, int] = {}
    for (layer, _), t in gathered.totals.items():
        masses[layer] = masses.get(layer, 0) + int(t.masses[p])
    for (layer, kv_head), t in gathered.totals.items():
        measured = t.masses[p] > 0
        error = t.error[p] / t.errors[p] if t.errors[p] else None
        overlap = None
        if gathered.ropes is not None:
            overlap, error = gathered.rerotated[layer, kv_head].means(p)
        rows.append(
            {
                "layer": layer,
                "kv_head": kv_head,
                "mass": t.mass[p] / t.masses[p] if measured else None,
                "mass_p5": t.p5(p),
                "mass_worst": float(t.worst[p]) if measured else None,
                "hits": int(t.hits[p]),
                "misses": int(t.misses[p]),
                "evictions": int(t.evictions[p]),
                "overlap": overlap,
                "output_error": error,
                "ties": int(t.ties[p]),
                "bound": t.mean_bound(p),
                "bound_layer": as_mean(gathered.moving.of_layers[layer][p], masses[layer]),
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _last_cut(when: When, request: Request) -> int:
    cuts = when.cuts(request.tokens, min(request.prompt_tokens, request.tokens))
    return int(cuts[-1]) if len(cuts) else request.tokens - 1
