"""Pieces that every page is built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import html

Component = Any
Children = Sequence[Component] | Component | str


def panel(
    title: str, children: Children, *, aside: Children = (), class_name: str = ""
) -> Component:
    """A titled box; `aside` stands at the right of the title."""
    head = html.Div(
        [html.H2(title), html.Div(aside, className="kv-panel-aside")], className="kv-panel-head"
    )
    return html.Section(
        [head, html.Div(children, className="kv-panel-body")], className=f"kv-panel {class_name}"
    )


def field(label: str, control: Component) -> Component:
    """A labelled control of a toolbar."""
    return html.Div([html.Span(label, className="kv-label"), control], className="kv-field")


def select(select_id: str, data: list[Any], value: str | None, width: int, label: str) -> Component:
    """A compact drop-down; its label is for screen readers, `field` shows one."""
    return dmc.Select(
        id=select_id,
        data=data,
        value=value,
        w=width,
        size="xs",
        allowDeselect=False,
        searchable=True,
        maxDropdownHeight=320,
        comboboxProps={"shadow": "md"},
        attributes={"input": {"aria-label": label}},
    )


def segmented(control_id: str, options: Sequence[tuple[str, str]], value: str) -> Component:
    """A choice of a few (value, label) options."""
    data = [{"value": option, "label": label} for option, label in options]
    return dmc.SegmentedControl(id=control_id, data=data, value=value, size="xs")


def button(button_id: str, label: Children, title: str, class_name: str = "") -> Component:
    """A small button."""
    return html.Button(
        label, id=button_id, title=title, className=f"kv-button {class_name}", type="button"
    )


def icon_button(button_id: str, icon: str, title: str) -> Component:
    """A small button with a drawn icon of assets/app.css."""
    shape = html.Span(className=f"kv-icon kv-icon-{icon}")
    return html.Button(
        shape,
        id=button_id,
        title=title,
        className="kv-button",
        type="button",
        **{"aria-label": title},
    )


def transport(page: str, unit: str, speeds: Sequence[str], speed: str) -> Component:
    """The clock of a page that plays, in the units it counts by: `token`, `step`."""
    buttons = [
        icon_button(f"{page}-first", "first", f"To the first {unit} (Home)"),
        icon_button(f"{page}-back", "back", "Step back (left arrow)"),
        button(f"{page}-play", "Play", "Play or pause (space)", "kv-primary kv-play"),
        icon_button(f"{page}-forward", "forward", "Step forward (right arrow)"),
        icon_button(f"{page}-last", "last", f"To the last {unit} (End)"),
    ]
    choice = segmented(f"{page}-speed", [(one, one) for one in speeds], speed)
    return html.Div(
        [
            html.Div(buttons, className="kv-button-group kv-transport-buttons"),
            # The slider is made in the browser: React would redraw it on every frame of the clock.
            html.Div(id=f"{page}-seek", className="kv-slider"),
            html.Div(id=f"{page}-clock", className="kv-clock"),
            field(f"{unit.capitalize()}s/s", choice),
        ],
        className="kv-transport",
    )


def empty_state(title: str, text: str, command: str | None = None) -> Component:
    """What a page shows when there is nothing to show: why, and what to do about it."""
    children: list[Component] = [
        html.Div(className="kv-empty-mark"),
        html.H1(title),
        html.P(text),
    ]
    if command is not None:
        children.append(html.Code(command, className="kv-command"))
    return html.Div(children, className="kv-empty")


def status_line(line_id: str) -> Component:
    """A line for errors and notices of a page, filled in the browser."""
    return html.Div(id=line_id, className="kv-status", role="status")


def work_line(button_id: str) -> list[Component]:
    """How far the work is that a button started, and what came of it; see assets/work.js."""
    bar = html.Div(id=f"{button_id}-bar", className="kv-progress-bar")
    return [
        html.Div([bar], id=f"{button_id}-progress", className="kv-progress"),
        status_line(f"{button_id}-status"),
    ]
