"""Every page in a real browser: no error, nothing asked of another host, empty, light and dark.

The `browser` fixture fails a test whose page logged an error or asked another machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.browser.conftest import Browser, Serve

READY = {
    "/": "document.querySelectorAll('#runs-grid .ag-row').length > 1",
    "/attention": "document.getElementById('attention-readout')?.dataset.weight",
    "/replay": "document.querySelectorAll('.kv-card[data-kept]').length === 4",
    "/sql": "document.querySelectorAll('.kv-schema details').length > 10",
}


@pytest.mark.parametrize("page", READY)
def test_every_page_loads(browser: Browser, address: str, page: str) -> None:
    browser.open(address + page)
    browser.until(READY[page])
    assert browser.js("return document.documentElement.scrollWidth <= innerWidth")
    title = browser.until("document.title.endsWith('kvtrace') && document.title")
    assert title.split(" ")[0].lower() == (page.strip("/") or "runs")


def test_navigation_keeps_the_trace(browser: Browser, address: str) -> None:
    browser.open(f"{address}/sql?trace=run.kvtrace")
    browser.until(READY["/sql"])
    for name, page in (("Attention", "/attention"), ("Replay", "/replay"), ("Runs", "/")):
        browser.js(
            "[...document.querySelectorAll('.kv-nav-link')]"
            ".find((link) => link.innerText === arguments[0]).click()",
            name,
        )
        browser.until(READY[page])
        if page != "/":
            assert "trace=run.kvtrace" in browser.query()


def test_a_page_may_be_the_first_thing_a_viewer_is_asked(
    browser: Browser, serve: Serve, trace_root: Path
) -> None:
    """Dash collects pages and scripts on its first request: a deep link has to be enough."""
    browser.open(serve(trace_root / "run.kvtrace") + "/replay?trace=run.kvtrace")
    browser.until(READY["/replay"])


def test_the_list_shows_a_damaged_trace_and_why(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.until(READY["/"])
    rows = browser.text("#runs-grid")
    assert "Complete" in rows
    assert "Unreadable" in rows
    browser.js(
        "[...document.querySelectorAll('#runs-grid .ag-row')]"
        ".find((row) => row.innerText.includes('Unreadable'))"
        ".querySelector('[col-id=status]').click()"
    )
    line = browser.until("document.getElementById('runs-status').innerText")
    assert line.startswith("broken: ")


def test_a_click_opens_a_trace(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.until(READY["/"])
    browser.click("#runs-grid .ag-row a")
    browser.until("location.pathname === '/attention'")
    browser.until(READY["/attention"])


@pytest.mark.parametrize("page", READY)
def test_an_empty_folder_says_what_to_do(
    browser: Browser, empty_address: tuple[str, Path], page: str
) -> None:
    address, folder = empty_address
    browser.open(address + page)
    browser.until("document.querySelector('.kv-empty')")
    text = browser.text(".kv-empty")
    assert f"No traces under {folder}" in text
    assert "kvtrace demo" in text


def test_an_address_that_is_no_page_says_so(browser: Browser, address: str) -> None:
    browser.open(f"{address}/nowhere")
    browser.until("document.querySelector('.kv-empty')")
    assert "There is no such page" in browser.text(".kv-empty")


def test_a_trace_that_is_not_there_says_so(browser: Browser, address: str) -> None:
    browser.open(f"{address}/attention?trace=../gone.kvtrace")
    browser.until("document.querySelector('.kv-empty')")
    assert "no trace named '../gone.kvtrace'" in browser.text(".kv-empty")


def test_dark_is_dark_everywhere_and_stays(browser: Browser, address: str) -> None:
    luminance = (
        "(() => { const [r, g, b] = getComputedStyle(document.body).backgroundColor"
        ".match(/[0-9]+/g).map(Number); return 0.3 * r + 0.6 * g + 0.1 * b; })()"
    )
    browser.open(address + "/replay")
    browser.until(READY["/replay"])
    assert browser.js(f"return {luminance}") > 200
    light = browser.js("return document.querySelector('.kv-card canvas').toDataURL()")
    plot = "document.querySelector('#replay-mass .js-plotly-plot').layout.font.color"
    ink = browser.until(plot)
    browser.click("#color-scheme")
    browser.until(f"{luminance} < 40")
    browser.until(f"{plot} !== arguments[0]", ink)
    browser.until("document.querySelector('.kv-card canvas').toDataURL() !== arguments[0]", light)
    browser.open(address + "/sql")
    browser.until(READY["/sql"])
    assert browser.js(f"return {luminance}") < 40
    browser.click("#color-scheme")
    browser.until(f"{luminance} > 200")


def test_picking_a_trace_shows_it_on_the_same_page(browser: Browser, address: str) -> None:
    browser.open(f"{address}/sql?trace=broken.kvtrace")
    browser.until("document.querySelector('.kv-empty')")
    browser.click("#trace-picker")
    option = (
        "[...document.querySelectorAll('[role=option]')].find((one) => one.innerText === 'run')"
    )
    browser.until(option)
    browser.js(f"{option}.click()")
    browser.until("location.search === '?trace=run.kvtrace'")
    browser.until(READY["/sql"])


def test_a_link_to_what_is_shown_keeps_the_view(browser: Browser, address: str) -> None:
    """As does Dash's Location, which does what a link does where it renders late."""
    browser.open(f"{address}/attention?trace=run.kvtrace")
    browser.until(READY["/attention"])
    view = browser.query()
    assert "pool=" in view
    steps = browser.js("return history.length")
    browser.js("document.querySelector('.kv-nav-link.kv-active').click()")
    assert browser.query() == view
    assert browser.js("return history.length") == steps


def test_going_back_restores_the_view_that_was_left(browser: Browser, address: str) -> None:
    browser.open(f"{address}/attention?trace=run.kvtrace&layer=2&head=3&x=10&y=30&span=20")
    browser.until(READY["/attention"])
    # The page writes its whole state into the address before it draws.
    assert "pool=" in browser.query()
    left = browser.query()
    browser.js("document.querySelector('.kv-brand').click()")
    browser.until(READY["/"])
    browser.driver.back()
    browser.until(READY["/attention"])
    assert browser.query() == left
    caption = browser.until("document.getElementById('attention-caption').innerText")
    assert "queries 30 to 49, keys 10 to 29" in caption
