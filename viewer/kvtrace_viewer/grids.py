"""AG Grid settings that every grid shares; colours follow the page through CSS variables."""

from __future__ import annotations

from typing import Any

import dash_ag_grid as dag

from kvtrace_viewer.components import Component

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


#: Of every column that says nothing else.
COLUMN = {"sortable": True, "resizable": True, "suppressMovable": True}


def grid(
    grid_id: str,
    columns: list[dict[str, Any]],
    nothing: str = "",
    *,
    height: int | str | None = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Component:
    """A grid of the house's looks.

    Parameters
    ----------
    nothing : str
        Stands where there are no rows.
    height : int or str, optional
        Pixels, or of CSS; as high as its rows without it.
    options : dict, optional
        Further options of AG Grid.
    **more
        Of `dash_ag_grid.AgGrid`.
    """
    chosen = {**GRID_OPTIONS, "localeText": {"noRowsToShow": nothing}, **(options or {})}
    if height is None:
        chosen["domLayout"] = "autoHeight"
    return dag.AgGrid(
        **{
            "id": grid_id,
            "rowData": [],
            "columnDefs": columns,
            "defaultColDef": COLUMN,
            "dashGridOptions": chosen,
            "className": "kv-grid",
            "style": {"height": height, "width": "100%"},
            **more,
        }
    )


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
