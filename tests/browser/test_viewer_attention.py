"""The attention page: the weights it tells are the trace's own, and its address is the view."""

from __future__ import annotations

import csv
import time
from typing import TYPE_CHECKING

import numpy as np
from tests.browser.conftest import TEXT, TIMEOUT_S

import kvtrace
from kvtrace_recorder import demo, record

if TYPE_CHECKING:
    from pathlib import Path

    from tests.browser.conftest import Browser, NewBrowser, Serve

    from kvtrace import Trace

SETTLED = (
    "document.getElementById('attention-map')?.dataset.busy === 'false' && "
    "document.getElementById('attention-marks').dataset.count !== '' && "
    "document.getElementById('attention-readout').dataset.weight"
)
PICTURE = "return document.getElementById('attention-map').toDataURL()"


def show(browser: Browser, address: str, query: str) -> None:
    browser.open(f"{address}/attention?trace=run.kvtrace{query}")
    browser.until(SETTLED)


def test_hover_tells_the_traces_own_weight(browser: Browser, address: str, trace: Trace) -> None:
    show(browser, address, "&layer=2&head=5")
    tokens = trace.tokens(0)["text"].to_pylist()
    told: set[tuple[int, int]] = set()
    for x, y in ((120, 300), (200, 420), (300, 420)):
        browser.hover("#attention-map", x, y)
        # The pointer gets there in steps, each of which may tell its own pair.
        browser.until(
            "(({ row, key }) => !arguments[0].includes(`${row},${key}`))"
            "(document.getElementById('attention-readout').dataset)",
            [f"{row},{key}" for row, key in told],
        )
        readout = browser.js(
            "const box = document.getElementById('attention-readout');"
            "return {...box.dataset, text: box.innerText}"
        )
        row, key = int(readout["row"]), int(readout["key"])
        want = trace.attention(2, 5, rows=np.array([row]))[0, key]
        assert float(readout["weight"]) == float(want)
        assert tokens[row].strip() in readout["text"]
        assert tokens[key].strip() in readout["text"]
        told.add((row, key))
    assert len(told) == 3


def test_what_was_not_kept_is_said_and_not_drawn(
    browser: Browser, serve: Serve, tmp_path: Path
) -> None:
    model, tokenizer = demo.load()
    batch = tokenizer(TEXT, return_tensors="pt")
    path = tmp_path / "run.kvtrace"
    with record(
        model, path, tokenizer=tokenizer, layers="1,3", heads=[1], queries="last=4", progress=False
    ):
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    some = kvtrace.open(path)
    heads = some.layers[0].q_head_numbers
    # The address has the model's own numbers, whatever was left out.
    show(browser, serve(tmp_path), f"&layer=3&head={heads[0]}&pool=max")
    browser.until("document.getElementById('attention-status').textContent.includes('last=4')")
    assert browser.find("#attention-layer").get_attribute("value") == "3"
    assert browser.find("#attention-head").get_attribute("value") == str(heads[0])
    browser.hover("#attention-map", 120, 130)
    browser.until(
        "document.getElementById('attention-readout').innerText.includes('query not kept')"
    )
    last = len(some.request_rows()) - 1
    browser.js("document.getElementById('attention-map').focus()")
    show(browser, serve(tmp_path), f"&layer=3&head={heads[0]}")
    told = browser.data("#attention-readout")
    assert int(told["row"]) == last
    want = some.attention(3, heads[0], rows=np.array([last]))[0, int(told["key"])]
    assert float(told["weight"]) == float(want)


def test_marks_are_listed_with_glyph_and_token(browser: Browser, address: str) -> None:
    show(browser, address, "&layer=3&head=1")
    count = int(browser.data("#attention-marks")["count"])
    assert browser.js("return document.querySelectorAll('.kv-mark').length") == count
    if count:
        assert browser.text(".kv-mark")[0] in "▲◆"


def test_the_wall_chooses_a_head(browser: Browser, address: str, trace: Trace) -> None:
    show(browser, address, "&layer=0&head=0")
    planes = 2 * sum(layer.num_q_heads for layer in trace.layers)
    browser.until(
        "document.getElementById('attention-wall').dataset.loaded === arguments[0]", str(planes)
    )
    wall = browser.find("#attention-wall")
    step = (wall.size["width"] - 26) / trace.layers[0].num_q_heads
    browser.hover("#attention-wall", 26 + 3.4 * step, 26 + 1.4 * step)
    wall.click()
    browser.hover("#attention-wall", 26 + 3.4 * step, 26 + 1.4 * step)
    browser.js(
        "const box = arguments[0].getBoundingClientRect();"
        "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true,"
        "clientX: box.left + arguments[1], clientY: box.top + arguments[2]}))",
        wall,
        26 + 3.4 * step,
        26 + 1.4 * step,
    )
    browser.until("location.search.includes('layer=1') && location.search.includes('head=3')")


def test_the_address_restores_the_view_in_a_fresh_browser(
    browser: Browser, new_browser: NewBrowser, address: str
) -> None:
    show(browser, address, "&layer=1&head=2")
    whole = browser.js(PICTURE)
    browser.js(
        "const map = document.getElementById('attention-map');"
        "const box = map.getBoundingClientRect();"
        "for (let turn = 0; turn < 6; turn += 1) map.dispatchEvent(new WheelEvent('wheel', {"
        "deltaY: -100, clientX: box.left + 250, clientY: box.top + 380,"
        "bubbles: true, cancelable: true}))"
    )
    browser.find("#attention-scale").find_elements("css selector", "label")[2].click()
    browser.until("location.search.includes('scale=log') && location.search.includes('span=')")
    query = browser.query()
    browser.until(SETTLED)
    fresh = new_browser()
    for window in (fresh, browser):
        window.open(f"{address}/attention{query}")
        window.until(SETTLED)
    assert fresh.query() == query
    # The sharpest tiles may be still on their way.
    end = time.monotonic() + TIMEOUT_S
    while fresh.js(PICTURE) != browser.js(PICTURE) and time.monotonic() < end:
        time.sleep(0.05)
    assert fresh.js(PICTURE) == browser.js(PICTURE) != whole
    assert fresh.errors() == []


def test_exports_are_saved(browser: Browser, address: str, trace: Trace) -> None:
    show(browser, address, "&layer=0&head=1")
    for kind in ("png", "csv", "npz"):
        browser.click(f"#attention-{kind}")
        path = (
            browser.downloads
            / f"{'attention' if kind == 'png' else 'run'}-request0-layer0-head1.{kind}"
        )
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            if path.exists() and path.stat().st_size:
                break
            time.sleep(0.1)
        assert path.stat().st_size
    with (browser.downloads / "run-request0-layer0-head1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == trace.rows * (trace.rows + 1) // 2
    assert browser.text("#attention-status") == ""
