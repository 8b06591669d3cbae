"""The tiers page: serve, look at the map, go nearer, serve from other memory."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs

from kvtrace import Trace

from .conftest import Browser

REPLAY = "streaming_llm-25pct-step"
MAP = "document.querySelector('#tiers-map')"
GRID = "#tiers-grid .ag-center-cols-container .ag-row"


def choose(browser: Browser, select: str, label: str) -> None:
    """Choose an option of a drop-down by its words."""
    browser.click(f"#{select}")
    option = (
        "[...document.querySelectorAll('[role=option]')].find((o) => o.innerText === arguments[0])"
    )
    browser.until(option, label)
    browser.js(f"{option}.click()", label)


def test_runs_are_served_shown_and_kept(browser: Browser, address: str, trace: Trace) -> None:
    browser.open(f"{address}/tiers?trace=run.kvtrace")
    browser.until("document.querySelector('#tiers-status')?.innerText.startsWith('No run yet')")
    browser.until("document.querySelectorAll('#tiers-figures fieldset').length === 4")
    # Room for so few blocks beside the weights that they move.
    browser.click("#tiers-start")
    browser.until(f"document.querySelectorAll('{GRID}').length === 4")
    browser.until(f"{MAP}.dataset.rows > 0")
    [run] = trace.table("tier_runs").to_pylist()
    blocks = trace.table("tier_blocks")
    assert browser.data("#tiers-map")["rows"] == str(blocks.num_rows)
    assert parse_qs(browser.query().removeprefix("?"))["run"] == [run["tier_run"]]
    # Every block lies in the first tier after the only step.
    browser.js(f"{MAP}.scrollIntoView({{block: 'center'}})")
    browser.hover("#tiers-map", 300, 20)
    browser.until("document.querySelector('#tiers-tip').innerText.includes('Block 0')")
    tip = browser.text("#tiers-tip")
    assert "tokens 0 to 15" in tip
    assert "HBM" in tip
    assert "accesses: 1" in tip
    # Its tokens, by a replay.
    browser.js("window.scrollTo(0, 0)")
    choose(browser, "tiers-place", REPLAY.split("-", maxsplit=1)[0] + " · 25%")
    browser.click("#tiers-start")
    browser.until(f"document.querySelectorAll('{GRID}').length === 2")
    placed = next(row for row in trace.table("tier_runs").to_pylist() if row["kind"] == "tokens")
    assert placed["replay"] == REPLAY
    assert f"{placed['late_mass']:.4f}" in browser.text("#tiers-summary")
    # A link shows the same.
    browser.open(f"{address}/tiers?trace=run.kvtrace&run={placed['tier_run']}&first=4&count=10")
    browser.until(f"{MAP}?.dataset.rows === '10'")
    assert "tokens 4 to 13" in browser.text("#tiers-window")


def test_nothing_that_loads_moves_the_form(browser: Browser, address: str) -> None:
    top = "return document.querySelector('#tiers-start').getBoundingClientRect().top + scrollY"
    browser.open(f"{address}/tiers?trace=run.kvtrace")
    browser.until("document.querySelectorAll('#tiers-figures fieldset').length === 4")
    before = browser.js(top)
    figures = "document.querySelector('#tiers-figures')"
    # As it was before its figures, and before anything of a run.
    kept = f"const kept = [...{figures}.children]; {figures}.replaceChildren(); const found ="
    empty = browser.js(
        f"{kept} document.querySelector('#tiers-start').getBoundingClientRect().top + scrollY;"
        f"{figures}.append(...kept); return found;"
    )
    assert abs(empty - before) < 1
    browser.click("#tiers-start")
    browser.until(f"document.querySelectorAll('{GRID}').length === 4")
    browser.until(f"{MAP}.dataset.rows > 0")
    assert browser.js(top) == before


def test_a_link_restores_the_form(browser: Browser, address: str) -> None:
    figures = "10+1+1+20+2+2+30+3+3+40+4+4"
    browser.open(
        f"{address}/tiers?trace=run.kvtrace&machine=a100&mode=write-through&prefetch=yes"
        f"&figures={figures}"
    )
    inputs = "document.querySelectorAll('#tiers-figures input')"
    browser.until(f"{inputs}.length === 12 && {inputs}[0].value === '10'")
    browser.until("location.search.includes('mode=write-through')")
    asked = parse_qs(browser.query().removeprefix("?"))
    assert asked["figures"] == ["10 1 1 20 2 2 30 3 3 40 4 4"]
    assert (asked["machine"], asked["prefetch"]) == (["a100"], ["yes"])
    # What is as usual is left out, and a figure that changes is put in.
    assert "policy" not in asked
    browser.js(f"const one = {inputs}[1]; one.value = 7; one.dispatchEvent(new Event('change'));")
    assert "figures=10+7+1+20" in browser.query()


def test_what_is_wrong_is_said(browser: Browser, address: str) -> None:
    browser.open(f"{address}/tiers?trace=run.kvtrace")
    browser.until("document.querySelectorAll('#tiers-figures input').length > 3")
    # No room for the weights.
    browser.js("document.querySelector('#tiers-figures input').value = '0'")
    browser.click("#tiers-start")
    browser.until("document.querySelector('#tiers-start-status').innerText.includes('do not hold')")


def test_an_empty_folder_says_what_to_do(browser: Browser, empty_address: tuple[str, Path]) -> None:
    address, folder = empty_address
    assert not list(folder.glob("*.kvtrace"))
    browser.open(f"{address}/tiers")
    browser.until("document.body.innerText.includes('kvtrace demo')")
