"""Retained mass over budget, one line a policy, with the bounds that none can exceed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtrace_viewer.figures.theme import axis, base_layout, line_style

BOUNDS = {
    "bound": "bound",
    "bound_layer": "bound, heads of a layer together",
    "bound_model": "bound, all layers together",
}


def budget_curve(rows: Sequence[dict[str, Any]], scheme: str = "light") -> dict[str, Any] | None:
    """Draw how much attention each policy retains at each budget.

    Parameters
    ----------
    rows
        Of table `replays`: `policy`, `decide_when`, `budget`, `retained_mass`, `bound_scope` and
        the bounds.
    scheme
        "light" or "dark".

    Returns
    -------
    dict or None
        A Plotly figure; None where no policy was replayed at two budgets of one kind. Bounds over
        budgets that move are drawn where some policy moves its own. Budgets in
        percent and in tokens cannot share an axis: the kind with more points is drawn.
    """
    measured = [row for row in rows if row["retained_mass"] is not None]
    percent = [row for row in measured if row["budget"].endswith("%")]
    tokens = [row for row in measured if not row["budget"].endswith("%")]
    shown = percent if len(percent) >= len(tokens) else tokens
    rhythms = {row["decide_when"] for row in shown}
    needed = {"bound", *(f"bound_{row['bound_scope']}" for row in shown)}
    lines: dict[str, dict[float, float]] = {}
    bounds: dict[str, dict[float, float]] = {}
    for row in shown:
        # The rhythm only where it tells two lines apart.
        rhythm = f" · {row['decide_when']}" if len(rhythms) > 1 else ""
        budget = float(row["budget"].removesuffix("%"))
        lines.setdefault(row["policy"] + rhythm, {})[budget] = row["retained_mass"]
        for column, what in BOUNDS.items():
            if row[column] is not None and column in needed:
                bounds.setdefault(what + rhythm, {})[budget] = row[column]
    drawn = {name: points for name, points in lines.items() if len(points) > 1}
    if not drawn:
        return None
    data = [
        _line(name, points, line_style(index, scheme))
        for index, (name, points) in enumerate(
            sorted(drawn.items(), key=lambda item: -sum(item[1].values()) / len(item[1]))
        )
    ]
    thin = axis("", scheme)["tickfont"]["color"]
    data += [
        _line(name, points, {"color": thin, "dash": "dot", "width": 1})
        for name, points in bounds.items()
        if len(points) > 1
    ]
    layout = base_layout(scheme)
    unit = "% of the tokens" if shown is percent else "tokens"
    layout["xaxis"] = axis(f"budget ({unit})", scheme)
    layout["yaxis"] = axis("retained mass", scheme, tickformat=".2f")
    return {"data": data, "layout": layout}


def _line(name: str, points: dict[float, float], style: dict[str, Any]) -> dict[str, Any]:
    budgets = sorted(points)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": budgets,
        "y": [points[budget] for budget in budgets],
        "line": style,
        "marker": {"size": 5},
        "hovertemplate": "%{y:.4f}",
    }
