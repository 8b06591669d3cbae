"""A trace of KV events has no tokens: everything that reads traces says so, and SQL answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import kvtrace
import kvtrace.cli
from kvtrace_viewer import pages
from kvtrace_viewer.app import create_app
from kvtrace_viewer.asgi import ask
from kvtrace_viewer.context import Context
from kvtrace_viewer.library import TraceLibrary

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kv-events.md"
MESSAGES: list[list[Any]] = [
    [1.0, [{"type": "BlockStored", "block_hashes": [1, 2, 3], "session_id": "a"}]],
    [2.0, [{"type": "BlockStored", "block_hashes": [4], "parent_block_hash": 1}]],
    [3.0, [{"type": "BlockStored", "block_hashes": [1], "session_id": "b"}]],
    [4.0, [{"type": "BlockStored", "block_hashes": [2], "medium": "CPU"}]],
    [5.0, [{"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU"}, {"type": "Odd"}]],
    [6.0, [{"type": "BlockStored", "block_hashes": [3], "parent_block_hash": 2}]],
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> kvtrace.Trace:
    folder = tmp_path_factory.mktemp("events")
    for _, events in MESSAGES:
        for event in events:
            if event["type"] == "BlockStored":
                tokens = [t for value in event["block_hashes"] for t in (value, value + 100)]
                event |= {"block_size": 2, "token_ids": tokens}
                event.setdefault("medium", "GPU")
    (folder / "dump.jsonl").write_text("".join(json.dumps(m) + "\n" for m in MESSAGES))
    words = ["import", "kv-events", str(folder / "dump.jsonl"), "--out"]
    assert kvtrace.cli.main([*words, str(folder / "served.kvtrace")]) == 0
    return kvtrace.open(folder / "served.kvtrace")


def answers() -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Every question of the page with its answer on this trace."""
    queries = re.findall(r"```sql\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    expected: list[list[tuple[Any, ...]]] = [
        [("cpu", 1, 2), ("gpu", 4, 8)],
        [(1, [pytest.approx(4.0, abs=1e-6)] * 3)],
        [(2, 2, "3")],
        [(0, 3, [1, 101]), (1, 1, [2, 102]), (2, 0, [3, 103]), (3, 0, [4, 104])],
        [("b", 1, 0), ("a", 0, 3)],
        [("kv events", 1, "unknown event type Odd (line 5)")],
    ]
    return list(zip(queries, expected, strict=True))


@pytest.mark.parametrize(("query", "expected"), answers())
def test_the_questions_of_the_page(
    trace: kvtrace.Trace, query: str, expected: list[tuple[Any, ...]]
) -> None:
    found = [tuple(row.values()) for row in trace.sql(query).to_pylist()]
    if "order by" not in query.rsplit(")", 1)[-1]:
        found.sort()
    assert found == expected


def test_info_says_what_it_is(trace: kvtrace.Trace, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvtrace.cli.main(["info", str(trace.path)]) == 0
    out = capsys.readouterr().out
    assert "8 KV events of 4 blocks" in out
    assert "no policy can be replayed: no attention layer was recorded" in out
    assert kvtrace.cli.main(["info", "--json", str(trace.path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kv_events"], found["blocks"], found["rows"]) == (8, 4, 0)
    assert all(row["exactness"] == "no" for row in found["replayable"])


def test_a_replay_is_refused_in_one_line(
    trace: kvtrace.Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["replay", str(trace.path), "--policy", "h2o", "--budget", "50%"]
    assert kvtrace.cli.main(words) == 1
    assert "holds KV events and no tokens" in capsys.readouterr().err


def test_python_reads_it(trace: kvtrace.Trace) -> None:
    assert (trace.rows, trace.requests(), trace.layers) == (0, [], [])
    assert trace.signals == frozenset()
    with pytest.raises(kvtrace.errors.KvtraceError, match="request 0"):
        trace.attention(layer=0, head=0)


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.NAME))
def test_every_page_shows_something(trace: kvtrace.Trace, page: Any) -> None:
    context = Context.of(TraceLibrary(trace.path.parent))
    text = str(page.layout(context, trace="served.kvtrace"))
    assert "cannot be shown" not in text
    assert ("Events only" in text) == (page.NAME in ("Attention", "Replay", "Regret"))


def test_the_routes_answer(trace: kvtrace.Trace) -> None:
    server = create_app(trace.path.parent).server
    (row,) = ask(server, "/api/traces").json
    assert (row["status"], row["rows"], row["error"]) == ("complete", 0, None)
    for path in ("tokens", "tile", "thumbnails", "row"):
        query = {"trace": "served.kvtrace", "layer": 0, "head": 0, "level": 0, "row": 0}
        answer = ask(server, f"/api/{path}", {**query, "column": 0})
        assert answer.status == 400
        assert answer.json["error"]
