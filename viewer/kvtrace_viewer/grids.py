"""AG Grid settings that every grid shares; colours follow the page through CSS variables."""

from __future__ import annotations

from typing import Any

THEME = (
    "themeQuartz.withParams({"
    "backgroundColor: 'var(--surface)', foregroundColor: 'var(--text)', "
    "borderColor: 'var(--border)', accentColor: 'var(--accent)', "
    "headerBackgroundColor: 'var(--surface-2)', headerTextColor: 'var(--muted)', "
    "chromeBackgroundColor: 'var(--surface-2)', rowHoverColor: 'var(--hover)', "
    "oddRowBackgroundColor: 'var(--surface)', browserColorScheme: 'inherit', "
    "fontFamily: 'inherit', fontSize: 13, headerFontSize: 12, headerFontWeight: 600, "
    "spacing: 6, wrapperBorder: false, wrapperBorderRadius: 8, "
    "headerColumnBorder: false, columnBorder: false})"
)

GRID_OPTIONS: dict[str, Any] = {
    "theme": {"function": THEME},
    "animateRows": False,
    "tooltipShowDelay": 400,
    "enableCellTextSelection": True,
    "ensureDomOrder": True,
    "suppressCellFocus": False,
}


def text_column(name: str, title: str, **more: Any) -> dict[str, Any]:
    """A column of words."""
    return {"field": name, "headerName": title, **more}


def number_column(name: str, title: str, **more: Any) -> dict[str, Any]:
    """A column of counts, grouped by thousands and aligned right."""
    return {
        "field": name,
        "headerName": title,
        "type": "rightAligned",
        # A class of its own replaces the one that aligns.
        "cellClass": "ag-right-aligned-cell kv-number",
        "valueFormatter": {"function": "kvCount(params.value)"},
        **more,
    }
