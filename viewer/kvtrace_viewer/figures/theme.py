"""Colours of figures, for light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FONT = (
    'Inter, -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", '
    '"Liberation Sans", Arial, sans-serif'
)


@dataclass(frozen=True)
class Ink:
    """What a page's colour scheme asks of a figure; equal to the tokens of assets/tokens.css."""

    text: str
    muted: str
    grid: str
    surface: str


INKS = {
    "light": Ink(text="#1b2230", muted="#5b6577", grid="#e3e7ee", surface="#ffffff"),
    "dark": Ink(text="#e6e9ef", muted="#9aa4b5", grid="#29303b", surface="#161a21"),
}

# Okabe and Ito's colours, tellable apart under the common colour blindnesses; the two tones of
# each are for a light and a dark ground. Dashes tell the lines apart without colour.
LINES: list[dict[str, str]] = [
    {"light": "#0072b2", "dark": "#56b4e9", "dash": "solid"},
    {"light": "#c2570c", "dark": "#ff9d5c", "dash": "dash"},
    {"light": "#00805c", "dark": "#2bc99a", "dash": "dot"},
    {"light": "#a8508a", "dark": "#e39cc8", "dash": "dashdot"},
    {"light": "#8a6d00", "dark": "#f0d94a", "dash": "longdash"},
    {"light": "#5b6577", "dark": "#aab4c4", "dash": "longdashdot"},
]


def line_style(index: int, scheme: str) -> dict[str, Any]:
    """Colour and dash of the index-th line."""
    line = LINES[index % len(LINES)]
    return {"color": line[scheme], "dash": line["dash"], "width": 1.8}


def base_layout(scheme: str) -> dict[str, Any]:
    """Layout that every figure starts from."""
    ink = INKS[scheme]
    return {
        "font": {"family": FONT, "size": 12, "color": ink.text},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 52, "r": 16, "t": 34, "b": 40},
        "hovermode": "x unified",
        "hoverlabel": {
            "bgcolor": ink.surface,
            "bordercolor": ink.grid,
            "font": {"color": ink.text, "size": 12},
        },
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)",
            "color": ink.muted,
            "activecolor": ink.text,
        },
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }


def axis(title: str, scheme: str, **more: Any) -> dict[str, Any]:
    """Make an axis with the page's grid and text colours."""
    ink = INKS[scheme]
    return {
        "title": {"text": title, "font": {"size": 12, "color": ink.muted}},
        "gridcolor": ink.grid,
        "linecolor": ink.grid,
        "zeroline": False,
        "tickfont": {"size": 11, "color": ink.muted},
        **more,
    }
