"""Take the documentation's pictures: python tests/browser/screenshots.py traces docs/screenshots.

Needs chromium, and a folder with the demo trace (`kvtrace demo --no-view`).
"""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kvtrace
from kvtrace.marks import find_marks
from kvtrace_viewer.derived.source import LayerCache
from kvtrace_viewer.tiers import read_hardware
from kvtrace_viewer.tiers.storage import store_tokens
from kvtrace_viewer.tiers.tokens import place_tokens

WIDTH, HEIGHT = 1440, 900
SPAN = 36
# Of assets/map.js: the room that its axes take.
MARGIN = {"left": 78, "top": 10, "right": 64, "bottom": 94}
TRACE = "demo.kvtrace"
# A run of continuous batching, where there is one, for the page of blocks.
SERVED = "served.kvtrace"
SQL = (
    "select t.text, count(*) as times, min(t.position) as first, max(t.position) as last\n"
    "from tokens t join rows r using (request, position)\n"
    "where r.has_query\ngroup by t.text\nhaving count(*) > 3\norder by times desc, text"
)


def main() -> None:
    """Serve the folder, and take each page once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    command = "import sys; from kvtrace.cli import main; sys.exit(main())"
    server = subprocess.Popen(
        [sys.executable, "-c", command, "view", str(args.traces), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    address = server.stdout.readline().split()[2]
    browser_class: Any = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["Browser"]
    with tempfile.TemporaryDirectory() as profile:
        browser = browser_class(Path(profile))
        try:
            take_all(browser, address, args.traces, args.out)
        finally:
            browser.close()
            server.terminate()
            server.wait()


def take_all(browser: Any, address: str, traces: Path, out: Path) -> None:
    """Take every picture."""
    trace = kvtrace.open(traces / TRACE)
    layer, head, key = striking_head(trace)
    here = f"trace={TRACE}&layer={layer}&head={head}"
    last = trace.rows - 1
    browser.open(address)
    scheme(browser, "light")
    take(browser, address + "/", out / "runs.png")
    take(browser, f"{address}/attention?{here}&scale=sqrt", out / "attention.png")
    middle = trace.requests()[0].prompt_tokens + 80
    kv_head = head // trace.layers[layer].group_size
    take(
        browser,
        f"{address}/replay?trace={TRACE}&layer={layer}&head={kv_head}&t={min(middle, last)}",
        out / "replay.png",
    )
    take(browser, f"{address}/regret?trace={TRACE}&replay=h2o-25pct-step", out / "regret.png")
    run = tiers_run(trace)
    take(browser, f"{address}/tiers?trace={TRACE}&run={run}", out / "tiers.png", tall=500)
    if (traces / SERVED).exists():
        take(browser, f"{address}/blocks?trace={SERVED}&t=24", out / "blocks.png")
    browser.js(
        "history.replaceState(null, '', '/sql?' + new URLSearchParams(arguments[0]))",
        {"trace": TRACE, "q": SQL},
    )
    take(browser, browser.js("return location.href"), out / "sql.png")
    scheme(browser, "dark")
    start = max(0, min(key - 6, last - SPAN - 4))
    window = f"x={start}&y={start + 4}&span={SPAN}"
    take(
        browser,
        f"{address}/attention?{here}&scale=log&{window}",
        out / "attention-dark.png",
        hover=key_on_map(trace, layer, head, key, start),
    )


def tiers_run(trace: kvtrace.Trace) -> str:
    """Place the demo's tokens by a replay on a laptop; the name of the run."""
    found = place_tokens(trace, "h2o-25pct-step", read_hardware("laptop"))
    return store_tokens(trace, found)


def striking_head(trace: kvtrace.Trace) -> tuple[int, int, int]:
    """Layer, head and key of the sink, or else heavy hitter, that was read strongest for long."""
    cache, last = LayerCache(), trace.rows - 1
    found = [
        (
            mark.kind == "sink",
            mark.strength * (last - mark.position),
            spec.layer,
            head,
            mark.position,
        )
        for spec in trace.layers
        for head in range(spec.num_q_heads)
        for mark in find_marks(cache.head_map(trace, 0, spec.layer, head))
    ]
    return max(found)[2:] if found else (0, 0, 0)


def key_on_map(
    trace: kvtrace.Trace, layer: int, head: int, key: int, start: int
) -> tuple[float, float]:
    """Cell of the window where the key is read most, as shares of the map's width and height."""
    rows = slice(start + 4, start + SPAN + 4)
    weights = trace.attention(layer, head, rows=rows, keys=slice(key, key + 1))[:, 0]
    weights[: max(0, key + 6 - rows.start)] = 0
    return (key - start + 0.5) / SPAN, (int(weights.argmax()) + 0.5) / SPAN


def scheme(browser: Any, name: str) -> None:
    """Choose light or dark."""
    browser.js("localStorage.setItem('mantine-color-scheme-value', arguments[0])", name)


def take(
    browser: Any,
    url: str,
    path: Path,
    hover: tuple[float, float] | None = None,
    tall: int = 0,
) -> None:
    """Take one page once it has settled, some pixels taller than the others."""
    metrics = {"width": WIDTH, "height": HEIGHT + tall, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.open(url)
    time.sleep(5)
    if hover is not None:
        size = browser.find("#attention-map").size
        side = min(
            size["width"] - MARGIN["left"] - MARGIN["right"],
            size["height"] - MARGIN["top"] - MARGIN["bottom"],
        )
        browser.hover(
            "#attention-map", MARGIN["left"] + hover[0] * side, MARGIN["top"] + hover[1] * side
        )
        time.sleep(1)
    browser.driver.save_screenshot(str(path))
    print(path, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
