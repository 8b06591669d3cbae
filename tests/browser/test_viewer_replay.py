"""The replay page: what its cards show at a time is what `evicted_at` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tests.browser.conftest import Browser, NewBrowser

    from kvtrace import Trace

CARDS = "document.querySelectorAll('.kv-card[data-kept]').length === arguments[0]"
REPLAYS = [f"{name}-25pct-step" for name in ("full", "sliding_window", "streaming_llm", "h2o")]


def kept_at(trace: Trace, replay: str, layer: int, kv_head: int, time: int) -> int:
    evicted_at = trace.replay(replay).array("evicted_at").read(0, trace.rows)[:, layer, kv_head]
    position = np.arange(trace.rows)
    return int(((position <= time) & ((evicted_at < 0) | (evicted_at > time))).sum())


def shown_time(browser: Browser) -> int:
    return int(browser.data("#replay-cards")["time"])


def check_cards(browser: Browser, trace: Trace, layer: int, kv_head: int) -> None:
    time = shown_time(browser)
    for replay in REPLAYS:
        shown = browser.data(f".kv-card[data-replay='{replay}']")
        assert int(shown["kept"]) == kept_at(trace, replay, layer, kv_head, time), (replay, time)


def test_play_moves_one_clock_for_all_and_cells_equal_the_result(
    browser: Browser, address: str, trace: Trace
) -> None:
    browser.open(f"{address}/replay?trace=run.kvtrace&layer=1&head=1&speed=16")
    browser.until(CARDS, len(REPLAYS))
    start = shown_time(browser)
    assert start == trace.requests()[0].prompt_tokens
    check_cards(browser, trace, 1, 1)
    browser.click("#replay-play")
    browser.until(
        "Number(document.getElementById('replay-cards').dataset.time) > arguments[0]", start + 5
    )
    browser.click("#replay-play")
    browser.until("document.getElementById('replay-play').innerText === 'Play'")
    check_cards(browser, trace, 1, 1)
    at = shown_time(browser)
    browser.click("#replay-back")
    browser.until(
        "document.getElementById('replay-cards').dataset.time === arguments[0]", str(at - 1)
    )
    check_cards(browser, trace, 1, 1)
    browser.click("#replay-first")
    browser.until("document.getElementById('replay-cards').dataset.time === '0'")
    check_cards(browser, trace, 1, 1)
    browser.click("#replay-last")
    browser.until(
        "document.getElementById('replay-cards').dataset.time === arguments[0]", str(trace.rows - 1)
    )
    check_cards(browser, trace, 1, 1)
    assert browser.js("return document.getElementById('replay-cursor').style.display") == "block"


def test_a_cell_tells_its_token_and_fate(browser: Browser, address: str, trace: Trace) -> None:
    browser.open(f"{address}/replay?trace=run.kvtrace&layer=1&head=0&t={trace.rows - 1}")
    browser.until(CARDS, len(REPLAYS))
    browser.hover(".kv-card[data-replay='sliding_window-25pct-step'] canvas", 5, 5)
    tip = browser.until("document.getElementById('replay-tip').innerText")
    evicted_at = trace.replay("sliding_window-25pct-step").array("evicted_at").read(0, 1)[0, 1, 0]
    assert f"evicted after query {evicted_at}" in tip
    assert trace.tokens(0)["text"][0].as_py() in tip


def test_the_address_restores_the_view_in_a_fresh_browser(
    browser: Browser, new_browser: NewBrowser, address: str, trace: Trace
) -> None:
    chosen = f"{REPLAYS[3]}+{REPLAYS[1]}"
    query = f"?trace=run.kvtrace&request=0&layer=2&head=1&replays={chosen}&speed=4&t=70"
    pictures = []
    for window in (browser, new_browser()):
        window.open(f"{address}/replay{query}")
        window.until(CARDS, 2)
        assert window.query() == query
        assert shown_time(window) == 70
        order = window.js(
            "return [...document.querySelectorAll('.kv-card')].map((card) => card.dataset.replay)"
        )
        assert order == [REPLAYS[3], REPLAYS[1]]
        pictures.append(
            window.js(
                "return [...document.querySelectorAll('.kv-card canvas')].map((c) => c.toDataURL())"
            )
        )
        assert window.errors() == []
    assert pictures[0] == pictures[1]


def test_run_stores_a_replay_and_shows_it(browser: Browser, address: str, trace: Trace) -> None:
    browser.open(f"{address}/replay?trace=run.kvtrace")
    browser.until(CARDS, len(REPLAYS))
    browser.js(
        "dash_clientside.set_props('replay-policies', {value: ['fifo']});"
        "dash_clientside.set_props('replay-budgets', {value: ['40']})"
    )
    browser.js("document.getElementById('replay-run').click()")
    line = browser.until(
        "document.getElementById('replay-run-status').className.includes('good') && "
        "document.getElementById('replay-run-status').innerText"
    )
    assert line == "Stored 1 replay."
    browser.until(CARDS, 1)
    shown = browser.data(".kv-card")
    assert shown["replay"].startswith("fifo-40-")
    assert int(shown["kept"]) == kept_at(trace, shown["replay"], 0, 0, shown_time(browser))


def test_a_wrong_policy_is_told_in_one_line(browser: Browser, address: str) -> None:
    browser.open(f"{address}/replay?trace=run.kvtrace")
    browser.until(CARDS, len(REPLAYS))
    browser.js(
        "dash_clientside.set_props('replay-policies', {value: ['h20']});"
        "dash_clientside.set_props('replay-budgets', {value: ['25%']})"
    )
    browser.js("document.getElementById('replay-run').click()")
    line = browser.until(
        "document.getElementById('replay-run-status').className.includes('error') && "
        "document.getElementById('replay-run-status').innerText"
    )
    assert "h20" in line
    assert "h2o" in line
