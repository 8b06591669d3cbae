"""How small a budget may be: curves of loss over the budget, from one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtrace.cached import cached_layers, cached_requests
from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.replay.amounts import Budget, parse_budget
from kvtrace_viewer.replay.cache import present
from kvtrace_viewer.replay.result import Result
from kvtrace_viewer.replay.run import replay
from kvtrace_viewer.replay.spec import parse_policy

QUANTITIES = ("mass", "output_error")
DEFAULT_BUDGETS = "2%..100%/2%"
TYPE_BYTES = {"float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}

Place = tuple[int | None, int | None]
"""(layer, KV head); (layer, None) is a whole layer, (None, None) the model."""


@dataclass(frozen=True)
class Point:
    """What is lost at one budget.

    Attributes
    ----------
    budget : str
    loss : float
        Share of the attention lost (1 - retained mass), or the mean relative output error.
    capacity : float or None
        Of the lost mass, what no policy could have kept under this budget (1 - the oracle's
        bound), or read (1 - what `top_k` finds); the rest is the policy's. None for output error,
        and where there is no bound.
    """

    budget: str
    loss: float
    capacity: float | None


@dataclass(frozen=True)
class Sizing:
    """Curves of one policy, by place.

    Attributes
    ----------
    curves : dict of Place to list of Point, budgets ascending
    when, of : str
    lose : float, the most that may be lost
    """

    curves: dict[Place, list[Point]]
    when: str
    of: str
    lose: float

    def smallest(self, place: Place) -> Point | None:
        """The smallest budget from which on no larger one loses more than `lose`; None: none."""
        found = None
        for point in reversed(self.curves[place]):
            if point.loss > self.lose:
                break
            found = point
        return found

    def places(self, kind: str) -> list[Place]:
        """Places of a kind: all, layer or head."""
        kinds = {"all": (True, True), "layer": (False, True), "head": (False, False)}
        return [p for p in self.curves if (p[0] is None, p[1] is None) == kinds[kind]]


def size(
    trace: Trace,
    policy: str,
    lose: float,
    of: str = "mass",
    when: str | None = None,
    requests: Sequence[int] | None = None,
    budgets: str = DEFAULT_BUDGETS,
    progress: Callable[[float], None] | None = None,
) -> Sizing:
    """Replay a policy and what bounds it over a range of budgets, in one pass.

    That is the oracle, or `top_k` where the policy chooses per query what is read.

    Raises
    ------
    InputError
        As `replay`; and where no row follows the first cut, or output error is asked of a trace
        without values.
    """
    rhythm = when or parse_policy(policy).default_when
    best = "top_k" if parse_policy(policy).selects else "oracle"
    names = [policy, best] if of == "mass" else [policy]
    results = replay(trace, names, [budgets], rhythm, requests, store=False, progress=progress)
    mine = [r for r in results if r.policy == policy]
    if any(_value(r, of) is None for r in mine):
        why = "no row follows the first cut" if mine[0].retained_mass is None else "it has no v"
        raise InputError(
            f"{trace.path} gives no {of} of {policy} with --when {rhythm}: {why}; something to "
            "measure was expected; try --when stream, or --of mass"
        )
    known = [r for r in results if r.policy == best] if of == "mass" else []
    order = sorted(range(len(mine)), key=lambda i: _amount(mine[i].budget))
    curves: dict[Place, list[Point]] = {}
    for i in order:
        bounds = bounds_by_place(known[i], mine[i]) if known else {}
        for place, value in _by_place(mine[i], of, _value(mine[i], of)).items():
            loss = 1 - value if of == "mass" else value
            least = None if place not in bounds else 1 - bounds[place]
            curves.setdefault(place, []).append(Point(mine[i].budget, loss, least))
    return Sizing(curves, rhythm, of, lose)


def bytes_held(
    trace: Trace,
    requests: Sequence[int] | None,
    context: int,
    batch: int,
    budget_of: Callable[[Place], Budget | None],
) -> dict[Place, tuple[int, int]]:
    """Bytes of the KV cache with the full cache and with budgets, `batch` sequences of `context`.

    Parameters
    ----------
    budget_of : callable
        The budget of a (layer, KV head); None keeps what the model keeps.

    Returns
    -------
    dict of Place to tuple of int
        Full, kept, by KV head. In the type the model computed in.
    """
    layers = cached_layers(trace, list(requests or cached_requests(trace)))
    types = {row["model"]: row["dtype"] for row in trace.table("models").to_pylist()}
    found: dict[Place, tuple[int, int]] = {}
    for layer in layers:
        there = present(np.array([context - 1]), layer.sliding_window)
        width = (layer.head_dim + layer.value_dim) * TYPE_BYTES.get(types[layer.model] or "", 2)
        for head in layer.kv_head_numbers:
            budget = budget_of((layer.layer, head))
            limit = there if budget is None else np.minimum(budget.limits(there), there)
            found[layer.layer, head] = (
                int(there[0]) * width * batch,
                int(limit[0]) * width * batch,
            )
    return found


def total_bytes(held: Mapping[Place, tuple[int, int]], place: Place) -> dict[str, int]:
    """`full`, `kept` and `saved` bytes of a place: the model, a layer or a KV head."""
    layer, head = place
    parts = [
        bytes_of
        for (of_layer, of_head), bytes_of in held.items()
        if layer in (None, of_layer) and head in (None, of_head)
    ]
    full, kept = (sum(one) for one in zip(*parts, strict=True)) if parts else (0, 0)
    return {"full": full, "kept": kept, "saved": full - kept}


def bounds_by_place(best: Result, of: Result) -> dict[Place, float]:
    """What the oracle's bounds, or `top_k` itself, allow a result, at the places they are over."""
    scope = of.bound_scope
    if scope is None:
        return {}
    whole = best.bound_of(scope)
    if scope == "read":
        return _by_place(best, "mass", whole)
    if scope == "head":
        return _by_place(best, "bound", whole)
    places = _by_place(best, "bound_layer", whole).items() if scope == "layer" else ()
    found = {place: value for place, value in places if place[1] is None}
    return found if whole is None else found | {(None, None): whole}


def _value(result: Result, of: str) -> float | None:
    return result.retained_mass if of == "mass" else result.output_error


def _amount(budget: str) -> float:
    found = parse_budget(budget)
    return float(found.percent if found.percent is not None else found.tokens or 0)


def _by_place(result: Result, column: str, whole: float | None) -> dict[Place, float]:
    """A number of table `replay_heads` by place: the model's is given, a layer's is the mean."""
    heads = result.heads
    columns: Any = zip(heads["layer"], heads["kv_head"], heads[column], strict=True)
    by_head: dict[Place, float] = {
        (layer, head): value for layer, head, value in columns if value is not None
    }
    by_layer: dict[int | None, list[float]] = {}
    for (layer, _), value in by_head.items():
        by_layer.setdefault(layer, []).append(value)
    found: dict[Place, float] = {} if whole is None else {(None, None): whole}
    # The heads of a layer have the same queries and rows, so that their mean is the layer's.
    found |= {(layer, None): float(np.mean(values)) for layer, values in by_layer.items()}
    return found | by_head
