"""Memory tiers over time: what they hold, what crosses their links, and who waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtrace_viewer.figures.theme import LINES, axis, base_layout, line_style

Numbers = Sequence[float]
Rows = Sequence[Sequence[float]]


def occupancy(seconds: Numbers, held: Rows, names: Sequence[str], scheme: str) -> dict[str, Any]:
    """Bytes in each tier [tier, time] over seconds."""
    data = [
        _line(name, seconds, held[number], line_style(number, scheme), "%{y:.3s}B")
        for number, name in enumerate(names)
        if any(held[number])
    ]
    return _figure(data, "bytes held", scheme)


def traffic(
    seconds: Numbers, up: Rows, down: Rows, names: Sequence[str], scheme: str
) -> dict[str, Any]:
    """Bytes over the link above each tier [tier, time]: upwards above 0, downwards below."""
    data = []
    for number, name in enumerate(names):
        style = line_style(number, scheme)
        for way, sign, values in (("up from", 1, up[number]), ("down to", -1, down[number])):
            if any(values):
                # Upwards and downwards are told by the side.
                signed = [sign * value for value in values]
                data.append(_line(f"{way} {name}", seconds, signed, style, "%{y:.3s}B"))
    return _figure(data, "bytes down (below 0), up", scheme)


def waiting(seconds: Numbers, compute: Numbers, stall: Numbers, scheme: str) -> dict[str, Any]:
    """Seconds of computing and of waiting for transfers over time."""
    data = [
        _line("computing", seconds, compute, line_style(0, scheme), "%{y:.3s}s"),
        _line("stalled", seconds, stall, line_style(1, scheme), "%{y:.3s}s"),
    ]
    return _figure(data, "seconds", scheme)


def tier_colours(scheme: str) -> list[str]:
    """Colours of tiers, the fastest first; the same as the lines'."""
    return [line[scheme] for line in LINES]


def _line(name: str, x: Numbers, y: Numbers, style: dict[str, Any], hover: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {**style, "shape": "hv", "width": 1.4},
        "hovertemplate": hover,
    }


def _figure(data: list[dict[str, Any]], title: str, scheme: str) -> dict[str, Any]:
    layout = base_layout(scheme)
    layout["xaxis"] = axis("seconds", scheme)
    layout["yaxis"] = axis(title, scheme, tickformat="~s", rangemode="tozero")
    layout["showlegend"] = True
    # Below, since these are narrow and the tools stand above.
    layout["legend"] = {"orientation": "h", "y": -0.28, "yanchor": "top", "x": 0}
    layout["margin"] = {**layout["margin"], "t": 28, "b": 84}
    return {"data": data, "layout": layout}
