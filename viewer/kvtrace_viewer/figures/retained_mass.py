"""Retained mass over time, one line a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtrace_viewer.figures.theme import axis, base_layout, line_style


@dataclass(frozen=True)
class MassSeries:
    """Retained mass of one replay.

    Attributes
    ----------
    label
        Name in the legend.
    positions
        Positions of the measured query tokens.
    mass
        Mean retained mass of each over layers and heads, 0 to 1.
    """

    label: str
    positions: Sequence[int]
    mass: Sequence[float | None]


def retained_mass(
    series: Sequence[MassSeries], num_tokens: int, scheme: str = "light"
) -> dict[str, Any]:
    """Draw the retained mass of several replays against the position of the query token.

    Parameters
    ----------
    series
        One entry a replay, in the order of the policies' cards.
    num_tokens
        Tokens of the request: the x axis starts at the first measured row and ends here.
    scheme
        "light" or "dark".
    """
    traces = [
        {
            "type": "scattergl" if len(one.positions) > 5000 else "scatter",
            "mode": "lines",
            "name": one.label,
            "x": list(one.positions),
            "y": list(one.mass),
            "line": line_style(index, scheme),
            "hovertemplate": "%{y:.4f}",
        }
        for index, one in enumerate(series)
    ]
    layout = base_layout(scheme)
    first = min((one.positions[0] for one in series if len(one.positions)), default=0)
    layout["xaxis"] = axis(
        "query position (tokens)", scheme, range=[first, max(num_tokens - 1, first + 1)]
    )
    layout["yaxis"] = axis("retained mass", scheme, tickformat=".2f")
    if not any(len(one.positions) for one in series):
        layout["yaxis"]["range"] = [0, 1]
        layout["annotations"] = [
            _note("No row follows the first cut." if series else "No replay is chosen.")
        ]
    return {"data": traces, "layout": layout}


def _note(text: str) -> dict[str, Any]:
    return {
        "text": text,
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": 0.5,
        "y": 0.5,
    }
