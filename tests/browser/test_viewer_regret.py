"""The regret page: wanted tokens, who wanted them, and the map of the query."""

from __future__ import annotations

from urllib.parse import parse_qs

from kvtrace import Trace
from kvtrace_viewer.derived.wanted import query_wants, wanted_tokens

from .conftest import Browser

REPLAY = "sliding_window-25pct-step"


def rows(grid: str) -> str:
    return f"document.querySelectorAll('#{grid} .ag-center-cols-container .ag-row')"


def test_a_wanted_token_leads_to_the_map_of_its_query(
    browser: Browser, address: str, trace: Trace
) -> None:
    browser.open(f"{address}/regret?trace=run.kvtrace&replay={REPLAY}")
    browser.until(f"{rows('regret-tokens')}.length > 3")
    # Nobody had asked before: the page computed them, and they are kept.
    first = wanted_tokens(trace, REPLAY, 1)[0]
    shown = browser.js(
        f"return {rows('regret-tokens')}[0].querySelector('[col-id=position]').innerText"
    )
    assert shown == str(first["position"])
    total = trace.sql(f"select sum(regret) s from replay_regrets where replay = '{REPLAY}'")
    assert f"{total['s'][0].as_py():,.4g}" in browser.text("#regret-summary")
    # The most wanted token is chosen already; another one shows its own.
    browser.until(f"{rows('regret-queries')}.length > 0")
    browser.until(f"document.querySelector('#regret-asked').innerText.includes({shown!r})")
    browser.js(f"{rows('regret-tokens')}[1].querySelector('.ag-cell').click()")
    second = wanted_tokens(trace, REPLAY, 2)[1]["position"]
    browser.until(f"document.querySelector('#regret-asked').innerText.includes('{second}:')")
    browser.js(f"{rows('regret-tokens')}[0].querySelector('.ag-cell').click()")
    browser.until(f"document.querySelector('#regret-asked').innerText.includes('{shown}:')")
    want = query_wants(trace, REPLAY, 0, first["position"])[0]
    link = f"{rows('regret-queries')}[0].querySelector('a')"
    assert browser.js(f"return {link}.innerText") == str(want["query"])
    browser.js(f"{link}.click()")
    browser.until("location.pathname === '/attention'")
    asked = parse_qs(browser.query().removeprefix("?"))
    assert asked["layer"] == [str(want["layer"])]
    assert asked["head"] == [str(want["q_head"])]
    x, y, span = (int(asked[name][0]) for name in ("x", "y", "span"))
    assert x <= first["position"] < x + span
    assert y <= want["query"] < y + span


def test_a_replay_that_evicts_nothing_says_so(browser: Browser, address: str) -> None:
    browser.open(f"{address}/regret?trace=run.kvtrace&replay=full-25pct-step")
    browser.until("document.querySelector('#regret-summary')?.innerText.startsWith('0 tokens')")
    browser.until("document.querySelector('#regret-tokens').innerText.includes('Nothing that')")
