"""The viewer's routes over a synthetic trace: the same numbers as the trace's own, clear errors."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.types import ASGIApp

import kvtrace
from kvtrace import Trace
from kvtrace.testing import SyntheticTrace, write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.app import create_app
from kvtrace_viewer.asgi import Answer, ask
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.catalog import tables
from kvtrace_viewer.derived.encode import encode
from kvtrace_viewer.derived.policies import policy_help
from kvtrace_viewer.library import TraceLibrary
from kvtrace_viewer.pages import PAGES
from kvtrace_viewer.pages.sql import EXAMPLES
from kvtrace_viewer.replay import POLICIES

PROMPT, DECODED = 60, 20
NAME = "synthetic.kvtrace"
Get = Callable[..., Answer]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("traces") / NAME
    with TraceWriter(path, source="synthetic", dtype="float32") as writer:
        specs = [LayerSpec(layer, 4, 2, 16, 16, 0.25) for layer in range(2)]
        write_synthetic(writer, specs, [PROMPT] + [1] * DECODED)
    return kvtrace.open(path)


@pytest.fixture(scope="module")
def server(trace: Trace) -> ASGIApp:
    app: ASGIApp = create_app(trace.path.parent).server
    return app


@pytest.fixture
def get(server: ASGIApp) -> Get:
    def asked(path: str, **query: Any) -> Answer:
        return ask(server, f"/api/{path}", {"trace": NAME, **query})

    return asked


def post(server: ASGIApp, path: str, **body: Any) -> Answer:
    return ask(server, f"/api/{path}", post={"trace": NAME, **body})


def test_health(server: ASGIApp) -> None:
    assert ask(server, "/healthz").json == {"status": "ok"}


def test_every_answer_forbids_other_hosts(server: ASGIApp) -> None:
    for path in ("/", "/assets/tokens.css", "/healthz", "/nowhere"):
        policy = ask(server, path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy


def test_strangers_are_refused(server: ASGIApp) -> None:
    assert ask(server, "/api/traces", headers={"host": "evil.example"}).status == 403
    assert ask(server, "/api/traces", headers={"origin": "http://evil.example"}).status == 403


def test_the_list_of_traces(get: Get, trace: Trace) -> None:
    (row,) = get("traces").json
    assert row["name"] == "synthetic"
    assert row["status"] == "complete"
    assert (row["layers"], row["heads"]) == (2, "4 / 2")
    assert row["tokens"] == row["rows"] == PROMPT + DECODED
    assert row["bytes"] == trace.bytes
    assert row["error"] is None


def test_a_row_is_the_traces_own_attention(get: Get, trace: Trace) -> None:
    got = np.frombuffer(get("row", layer=1, head=2, row=70).content, np.float32)
    assert np.array_equal(got, trace.attention(1, 2, rows=np.array([70]))[0])


def test_a_tile_is_the_traces_own_attention(get: Get, trace: Trace) -> None:
    content = get("tile", layer=1, head=3, level=0, row=0, column=0, scale="log").content
    plane = np.frombuffer(content, np.uint8).reshape(2, 256, 256)[0]
    want = trace.attention(1, 3)
    want[np.triu_indices(len(want), 1)] = np.nan
    got = plane[: trace.rows, : trace.rows].astype(int)
    # A block of another shape may round a weight to the neighbouring code.
    assert np.abs(got - encode(want, "log")).max() <= 1
    assert np.array_equal(got == 0, np.isnan(want))


def test_thumbnails_hold_two_planes_a_head(get: Get) -> None:
    content = get("thumbnails", layer=0).content
    planes = np.frombuffer(content, np.uint8).reshape(4, 2, 48, 48)
    assert planes[:, 0].max() > 1
    assert np.all(planes[:, 0] >= planes[:, 1])


@pytest.mark.parametrize(
    ("window", "weights"), [({}, 80 * 81 // 2), ({"row_start": 10, "key_stop": 5}, 70 * 5)]
)
def test_csv_export_holds_the_visible_pairs(
    get: Get, trace: Trace, window: dict[str, int], weights: int
) -> None:
    asked = {"row_start": 0, "row_stop": 80, "key_start": 0, "key_stop": 80, **window}
    answer = get("export", layer=0, head=1, **asked)
    assert 'filename="synthetic-request0-layer0-head1.csv"' in answer.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.content.decode())))
    assert len(rows) == weights
    attention = trace.attention(0, 1)
    for row in rows[:: len(rows) // 50]:
        assert float(row["weight"]) == pytest.approx(
            attention[int(row["query"]), int(row["key"])], rel=1e-6
        )


def test_npz_export_is_the_traces_own_attention(get: Get, trace: Trace) -> None:
    answer = get(
        "export", layer=0, head=1, kind="npz", row_start=5, row_stop=900, key_start=2, key_stop=9
    )
    with np.load(io.BytesIO(answer.content)) as saved:
        assert np.array_equal(saved["rows"], np.arange(5, 80))
        want = trace.attention(0, 1, rows=saved["rows"], keys=saved["keys"])
        assert np.array_equal(saved["weights"], want)


@pytest.mark.parametrize(
    ("path", "query", "says"),
    [
        ("row", {"layer": 9, "head": 0, "row": 0}, "no layer 9"),
        ("row", {"layer": 0, "head": 4, "row": 0}, "no query head 4"),
        ("row", {"layer": 0, "head": 0, "row": 999}, "999"),
        ("tile", {"layer": 0, "head": 0, "level": 0, "row": 0, "column": 0, "scale": "x"}, "scale"),
        ("tokens", {"request": 7}, "request 7"),
        ("evicted", {"replay": "../..", "layer": 0, "kv_head": 0}, "no replay"),
        ("evicted", {"replay": "x", "layer": 0, "kv_head": 2}, "no KV head 2"),
        ("mass", {"replays": "nothing"}, "no replay 'nothing'"),
        ("jobs/99", {}, "no job 99"),
        (
            "export",
            {
                "layer": 0, "head": 0, "kind": "exe",
                "row_start": 0, "row_stop": 1, "key_start": 0, "key_stop": 1,
            },
            "no export 'exe'",
        ),
        ("sql.csv", {"sql": "drop table rows"}, "read-only"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(get: Get, path: str, query: dict[str, Any], says: str) -> None:
    answer = get(path, **query)
    assert answer.status == 400
    assert says in answer.json["error"]
    assert "\n" not in answer.json["error"]


def test_an_unknown_trace_is_not_found(get: Get) -> None:
    answer = get("tokens", trace="../synthetic.kvtrace")
    assert answer.status == 404
    assert "no trace named" in answer.json["error"]


def test_sql_answers_rows_types_and_time(server: ASGIApp) -> None:
    answer = post(server, "sql", sql="select position, text, null as x from tokens limit 3").json
    assert [column["name"] for column in answer["columns"]] == ["position", "text", "x"]
    assert [column["numeric"] for column in answer["columns"]][:2] == [True, False]
    assert [row[0] for row in answer["rows"]] == [0, 1, 2]
    assert not answer["truncated"]


def test_sql_is_cut_at_the_limit_and_says_so(server: ASGIApp) -> None:
    answer = post(server, "sql", sql="select * from range(5000)").json
    assert answer["truncated"]
    assert len(answer["rows"]) == answer["limit"]


def test_sql_keeps_wide_integers_and_repeated_names(server: ASGIApp) -> None:
    answer = post(server, "sql", sql="select 9223372036854775807 as a, 1 as a").json
    assert answer["rows"] == [["9223372036854775807", 1]]


def test_sql_mistakes_get_one_line(server: ASGIApp) -> None:
    for sql in ("selec 1", "select * from nowhere", "copy rows to 'x'", ""):
        answer = post(server, "sql", sql=sql)
        assert answer.status == 400
        assert answer.json["error"]
        assert "\n" not in answer.json["error"]


def test_every_example_query_works(server: ASGIApp) -> None:
    from kvtrace_viewer.pages.sql import EXAMPLES

    for _, sql in EXAMPLES:
        assert post(server, "sql", sql=sql).status == 200


def wait(server: ASGIApp, job: int) -> dict[str, Any]:
    for _ in range(2400):
        state: dict[str, Any] = ask(server, f"/api/jobs/{job}").json
        if state["state"] != "running":
            return state
        time.sleep(0.1)
    raise AssertionError("the replay did not end")


def test_a_replay_runs_in_the_background_and_its_evictions_are_the_engines(
    server: ASGIApp, get: Get, trace: Trace
) -> None:
    order = {"policies": ["h2o", "streaming_llm:sinks=2"], "budgets": ["25%", "12"], "when": "step"}
    assert get("curve").json == {"figure": None}
    job = post(server, "replays", **order).json
    state = wait(server, job["id"])
    assert state["error"] is None
    assert len(state["results"]) == 4
    rows = {row["replay"]: row for row in get("replays").json}
    assert set(rows) == set(state["results"])
    for replay in rows:
        stored = trace.replay(replay).array("evicted_at").read(0, trace.rows)
        got = np.frombuffer(get("evicted", replay=replay, layer=1, kv_head=1).content, "<i4")
        assert np.array_equal(got, stored[:, 1, 1])
    mass = get("mass", replays=" ".join(rows)).json
    assert list(mass["series"]) == list(rows)
    assert mass["series"][state["results"][0]]["position"][-1] == PROMPT + DECODED - 1
    assert len(mass["figure"]["data"]) == 4
    # One budget in percent and one in tokens are no curve.
    assert get("curve").json == {"figure": None}
    wait(server, post(server, "replays", policies=["h2o"], budgets=["50%"], when="step").json["id"])
    (line,) = get("curve").json["figure"]["data"]
    assert (line["name"], line["x"]) == ("h2o", [25, 50])
    table = get("mass.csv", replays=state["results"][0]).content.decode().splitlines()
    assert len(table) == 1 + rows[state["results"][0]]["measured_rows"]


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ({"policies": [], "budgets": ["25%"]}, "no policy chosen"),
        ({"policies": ["h2o"], "budgets": []}, "no budget given"),
    ],
)
def test_an_empty_order_is_refused(server: ASGIApp, order: dict[str, Any], says: str) -> None:
    answer = post(server, "replays", **order)
    assert answer.status == 400
    assert says in answer.json["error"]


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ({"policies": ["h20"], "budgets": ["25%"]}, "h2o"),
        ({"policies": ["h2o"], "budgets": ["0"]}, "0"),
        ({"policies": ["h2o"], "budgets": ["many"]}, "many"),
    ],
)
def test_a_wrong_order_fails_in_one_line(server: ASGIApp, order: dict[str, Any], says: str) -> None:
    state = wait(server, post(server, "replays", **order).json["id"])
    assert state["state"] == "failed"
    assert says in state["error"]
    assert "\n" not in state["error"]


def test_sinks_of_the_viewer_are_the_replays_own(
    tmp_path: Path, synthetic_trace: SyntheticTrace
) -> None:
    """Both count sinks by policies.md; a sharp synthetic head has some."""
    sharp = synthetic_trace(
        [150, 1, 1], [LayerSpec(0, 4, 2, 4, 4, 3.0), LayerSpec(1, 4, 2, 4, 4, 3.0)], name="sharp"
    )
    name = "sharp.kvtrace"
    server: ASGIApp = create_app(tmp_path).server
    order = {"trace": name, "policies": ["full"], "budgets": ["100%"]}
    wait(server, ask(server, "/api/replays", post=order).json["id"])
    counted = 0
    for layer in range(2):
        for head in range(4):
            marks = ask(server, "/api/marks", {"trace": name, "layer": layer, "head": head}).json
            counted += sum(mark["kind"] == "sink" for mark in marks)
    (row,) = sharp.replays().to_pylist()
    assert counted == row["sinks"] > 0


def test_a_window_is_empty_above_and_left_of_it(
    tmp_path: Path, synthetic_trace: SyntheticTrace
) -> None:
    server: ASGIApp = create_app(tmp_path).server
    synthetic_trace([50], [LayerSpec(0, 2, 1, 8, 8, 0.3, "sliding", 16)], name="window")
    query = {"trace": "window.kvtrace", "layer": 0, "head": 0, "level": 0, "row": 0, "column": 0}
    plane = np.frombuffer(ask(server, "/api/tile", query).content, np.uint8)[: 256 * 256]
    plane = plane.reshape(256, 256)[:50, :50]
    distance = np.arange(50)[:, None] - np.arange(50)[None, :]
    assert np.array_equal(plane > 0, (distance >= 0) & (distance < 16))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.NAME)
def test_pages_build_from_any_query(page: Any, trace: Trace, tmp_path: Path) -> None:
    context = Context.of(TraceLibrary(trace.path.parent))
    for query in (
        {},
        {"trace": NAME},
        {"trace": NAME, "request": "x", "layer": "-1", "head": "99", "scale": "?", "t": "x"},
    ):
        text = str(page.layout(context, **query))
        assert "cannot be shown" not in text
        assert "toolbar" in text or "Result" in text or "runs-grid" in text
    if page.PATH != "/":
        assert "no trace named" in str(page.layout(context, trace="gone"))
    empty = tmp_path / "empty"
    empty.mkdir()
    text = str(page.layout(Context.of(TraceLibrary(empty))))
    assert f"No traces under {empty}" in text
    assert "kvtrace demo" in text


def test_every_policy_is_explained() -> None:
    found = {policy.name: policy for policy in policy_help()}
    assert list(found) == list(POLICIES)
    assert all(policy.idea.endswith(".") for policy in found.values())
    assert ("sinks=4", "first tokens that are never evicted (tokens)") in found[
        "streaming_llm"
    ].parameters
    assert found["full"].parameters == ()


def test_the_schema_shown_is_the_traces_own(trace: Trace) -> None:
    found = tables(trace)
    assert next(table for table in found if table.name == "rows").num_rows == trace.rows
    assert all(table.comment and (table.columns or table.kind == "function") for table in found)
    kinds = [table.kind for table in found]
    assert kinds[0] == "view"
    assert set(kinds) == {"view", "function", "derived", "recorded"}


@pytest.mark.parametrize(("name", "sql"), EXAMPLES)
def test_every_example_of_the_sql_page_is_answered(trace: Trace, name: str, sql: str) -> None:
    assert trace.sql(sql).num_columns > 1, name


def test_a_trace_being_recorded_is_shown_as_it_grows(tmp_path: Path) -> None:
    server: ASGIApp = create_app(tmp_path).server
    query = {"trace": "live.kvtrace"}
    specs = [LayerSpec(0, 2, 1, 8, 8, 0.3)]
    with TraceWriter(tmp_path / "live.kvtrace", source="synthetic") as writer:
        write_synthetic(writer, specs, [20, 1])
        writer.commit()
        (row,) = ask(server, "/api/traces").json
        assert (row["status"], row["tokens"]) == ("recording", 21)
        assert len(ask(server, "/api/tokens", query).json["tokens"]) == 21
        place = {**query, "layer": 0, "head": 1, "row": 20}
        assert len(ask(server, "/api/row", place).content) == 4 * 21
        answer = ask(server, "/api/sql", post={**query, "sql": "select count(*) from rows"})
        assert answer.json["rows"] == [[21]]
    (row,) = ask(server, "/api/traces").json
    assert row["status"] == "complete"


def test_a_trace_recorded_again_is_not_shown_from_a_cache(tmp_path: Path) -> None:
    server: ASGIApp = create_app(tmp_path).server
    query = {"trace": "run.kvtrace", "layer": 0, "head": 0}
    place = {**query, "level": 0, "row": 0, "column": 0}
    shown = []
    for seed in (1, 2):
        with TraceWriter(tmp_path / "run.kvtrace", source="synthetic", force=True) as writer:
            write_synthetic(writer, [LayerSpec(0, 2, 1, 8, 8, 0.3)], [30], seed=seed)
        shown.append(
            [
                ask(server, "/api/row", {**query, "row": 20}).content,
                ask(server, "/api/tile", place).content,
                ask(server, "/api/thumbnails", query).content,
            ]
        )
    assert all(before != after for before, after in zip(*shown, strict=True))


def test_a_trace_without_queries_says_so(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "e.kvtrace", source="synthetic", detail="events") as writer:
        write_synthetic(writer, [LayerSpec(0, 2, 1, 8, 8, 0.3)], [9])
    context = Context.of(TraceLibrary(tmp_path))
    text = str(PAGES[1].layout(context))
    assert "No attention in this trace" in text
    assert "--detail qkv" in text
    server: ASGIApp = create_app(tmp_path).server
    answer = ask(server, "/api/thumbnails", {"trace": "e.kvtrace", "layer": 0})
    assert answer.status == 400
    assert "q, k and lse" in answer.json["error"]


def test_an_empty_folder_answers(tmp_path: Path) -> None:
    server: ASGIApp = create_app(tmp_path).server
    assert ask(server, "/api/traces").json == []
    assert ask(server, "/").status == 200
