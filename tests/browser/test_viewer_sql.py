"""The SQL page: rows in a grid, one line for a mistake, the question in the address."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from selenium.webdriver.common.keys import Keys

if TYPE_CHECKING:
    from tests.browser.conftest import Browser, NewBrowser

    from kvtrace import Trace

ROWS = "document.querySelectorAll('#sql-grid .ag-center-cols-container .ag-row').length"


def write(browser: Browser, sql: str) -> None:
    editor = browser.find("#sql-text")
    editor.send_keys(Keys.CONTROL, "a")
    editor.send_keys(Keys.DELETE)
    editor.send_keys(sql)
    browser.until("document.getElementById('sql-text').value === arguments[0]", sql)


def test_ctrl_enter_fills_the_grid(browser: Browser, address: str, trace: Trace) -> None:
    browser.open(f"{address}/sql?trace=run.kvtrace")
    browser.find("#sql-text")
    write(browser, "select count(*) as n, max(position) as last from rows")
    browser.find("#sql-text").send_keys(Keys.CONTROL, Keys.ENTER)
    browser.until(f"{ROWS} === 1")
    cells = browser.text("#sql-grid .ag-center-cols-container .ag-row").split()
    assert [int(cell) for cell in cells] == [trace.rows, trace.rows - 1]
    assert "1 row in" in browser.text("#sql-timing")


def test_a_mistake_is_one_line_and_empties_the_grid(browser: Browser, address: str) -> None:
    browser.open(f"{address}/sql?trace=run.kvtrace")
    browser.find("#sql-text")
    write(browser, "select nothing from rows")
    browser.click("#sql-run")
    line = browser.until(
        "document.getElementById('sql-status').className.includes('error') && "
        "document.getElementById('sql-status').innerText"
    )
    assert "nothing" in line
    assert "\n" not in line
    # The refused request is the only thing the console may speak of.
    assert all("/api/sql" in error and "400" in error for error in browser.errors())


def test_a_write_is_refused(browser: Browser, address: str) -> None:
    browser.open(f"{address}/sql?trace=run.kvtrace&q={quote('drop table rows')}")
    line = browser.until(
        "document.getElementById('sql-status')?.className.includes('error') && "
        "document.getElementById('sql-status').innerText"
    )
    assert "read-only" in line
    browser.errors()


def test_the_address_restores_question_and_answer(
    browser: Browser, new_browser: NewBrowser, address: str
) -> None:
    sql = "select position, text from tokens\nwhere position < 7 and text <> 'a & b=c'"
    browser.open(f"{address}/sql?trace=run.kvtrace")
    browser.find("#sql-text")
    write(browser, sql)
    browser.click("#sql-run")
    browser.until(f"{ROWS} === 7")
    fresh = new_browser()
    fresh.open(f"{address}/sql{browser.query()}")
    fresh.until(f"{ROWS} === 7")
    assert fresh.js("return document.getElementById('sql-text').value") == sql
    cells = "#sql-grid .ag-center-cols-container"
    assert fresh.text(cells) == browser.text(cells)


def test_examples_are_offered(browser: Browser, address: str) -> None:
    browser.open(f"{address}/sql?trace=run.kvtrace")
    browser.click("#sql-examples")
    option = (
        "[...document.querySelectorAll('[role=option]')]"
        ".find((option) => option.innerText === 'Most frequent tokens')"
    )
    browser.until(option)
    browser.js(f"{option}.click()")
    browser.until("document.getElementById('sql-text').value.includes('from tokens')")
