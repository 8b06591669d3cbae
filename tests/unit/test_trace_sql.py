from __future__ import annotations

import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

import kvtrace
from kvtrace import QueryError, database, tables
from kvtrace.cli import main
from kvtrace.testing import SyntheticTrace, write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter


def test_open_and_closed_traces_show_the_same_tables(tmp_path: Path) -> None:
    questions = [
        "select count(*) as n, max(position) as last from rows",
        "select text from tokens order by position desc limit 3",
        "select * from layers",
        "select count(*) as n from replays",
    ]
    writer = TraceWriter(tmp_path / "x.kvtrace", source="synthetic")
    write_synthetic(writer, [LayerSpec(0, 2, 1, 8, 8, 0.5)], [20, 1, 1])
    trace = kvtrace.open(writer.path)
    assert trace.status == "recording"
    live = [trace.sql(question).to_pylist() for question in questions]
    assert live[0] == [{"n": 22, "last": 21}]
    writer.close()
    trace.refresh()
    assert trace.status == "complete"
    assert [trace.sql(question).to_pylist() for question in questions] == live


def test_the_database_is_a_plain_duckdb_file_with_comments(
    synthetic_trace: SyntheticTrace,
) -> None:
    trace = synthetic_trace()
    with duckdb.connect(str(trace.path / "trace.duckdb"), read_only=True) as connection:
        assert connection.execute("select count(*) from rows").fetchone() == (43,)
        (comment,) = connection.execute(
            "select comment from duckdb_tables() where table_name = 'gaps'"
        ).fetchall()[0]
    assert "does not hold" in comment
    # DuckDB's default blocks of 256 KiB made a trace of a few tokens 2.7 MB.
    # Every filled column takes a block of 16 KiB, so each new table of one row adds some.
    assert (trace.path / "trace.duckdb").stat().st_size < 2_000_000


def test_a_slow_query_draws_no_bar_into_the_answer(synthetic_trace: SyntheticTrace) -> None:
    found = synthetic_trace().sql("select current_setting('enable_progress_bar') as bar")
    assert found.to_pylist() == [{"bar": False}]


def test_a_deleted_or_stale_database_is_built_again(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace()
    (trace.path / "trace.duckdb").unlink()
    assert trace.sql("select count(*) as n from rows").to_pylist() == [{"n": 43}]
    assert (trace.path / "trace.duckdb").exists()


def test_a_read_only_trace_answers_without_its_database(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace()
    (trace.path / "trace.duckdb").unlink()
    folders = [trace.path, *(path for path in trace.path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert trace.sql("select count(*) as n from rows").to_pylist() == [{"n": 43}]
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("drop table rows", "DROP statement was found; a trace is read-only"),
        ("insert into rows values (1)", "INSERT statement"),
        ("create table x as select 1", "CREATE statement"),
        ("attach 'y.db'", "ATTACH statement"),
        ("set memory_limit = '1TB'", "a .* statement was found"),
        ("copy rows to 'x.csv'", "COPY statement"),
        ("install httpfs", "a .* statement was found"),
        ("select * from nowhere", "nowhere does not exist"),
        ("select 1; select 2", "2 statements were given; one was expected"),
        ("", "0 statements"),
        ("selec 1", "syntax error"),
        ("select * from read_csv('/etc/passwd')", "disabled by configuration"),
        ("select * from read_text('/proc/self/environ')", "disabled by configuration"),
    ],
)
@pytest.mark.parametrize("closed", [True, False])
def test_what_is_not_reading_is_refused(
    synthetic_trace: SyntheticTrace,
    query: str,
    message: str,
    closed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = synthetic_trace()
    if not closed:
        monkeypatch.setattr("kvtrace.sql._attach", lambda connection, trace: False)
    with pytest.raises(QueryError, match=message) as caught:
        trace.sql(query)
    assert "\n" not in str(caught.value)
    assert trace.sql("select count(*) as n from rows").to_pylist() == [{"n": 43}]


def test_a_query_without_end_is_stopped(synthetic_trace: SyntheticTrace) -> None:
    with pytest.raises(QueryError, match=r"limit of 0\.3 s"):
        synthetic_trace().sql(
            "select count(*) from range(1000000) a, range(1000000) b where a.range * b.range = 7",
            timeout_s=0.3,
        )


def test_a_query_past_its_memory_says_how_to_raise_it(synthetic_trace: SyntheticTrace) -> None:
    with pytest.raises(QueryError, match="--memory-limit"):
        synthetic_trace().sql(
            "select list(range order by random()) from range(30000000)", memory_limit="50MB"
        )


def test_max_rows_bounds_what_is_fetched(synthetic_trace: SyntheticTrace) -> None:
    assert synthetic_trace().sql("select * from rows", max_rows=5).num_rows == 5


def test_every_table_and_column_has_a_comment() -> None:
    assert all(tables.table_comments().values())
    bare = [f"{column.table}.{column.name}" for column in tables.columns() if not column.comment]
    assert not bare


@pytest.mark.parametrize("form", ["json", "csv", "table"])
def test_the_verb_prints_each_form(
    synthetic_trace: SyntheticTrace, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace()
    query = "select position, text from tokens where position < 2 order by 1"
    assert main(["sql", str(trace.path), query, "--format", form]) == 0
    out = capsys.readouterr().out
    if form == "json":
        assert json.loads(out) == [{"position": 0, "text": "t0"}, {"position": 1, "text": "t1"}]
    elif form == "csv":
        assert out.split() == ["position,text", "0,t0", "1,t1"]
    else:
        assert "t1" in out


def test_parquet_goes_to_a_file(synthetic_trace: SyntheticTrace, tmp_path: Path) -> None:
    trace, out = synthetic_trace(), tmp_path / "out.parquet"
    arguments = ["sql", str(trace.path), "select 7 as x", "--format", "parquet"]
    assert main(arguments) == 1
    assert main([*arguments, "--out", str(out)]) == 0
    assert pq.read_table(out).to_pylist() == [{"x": 7}]


def test_what_changes_while_the_database_is_built_makes_it_stale(
    synthetic_trace: SyntheticTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A replay published behind the build's back was invisible to SQL for good.
    trace = synthetic_trace()
    listed = database.State.segments

    def publish_after_listing(state: database.State) -> dict[str, list[Path]]:
        found = listed(state)
        replays = trace.path / "replays"
        replays.mkdir(exist_ok=True)
        now = time.time_ns()
        os.utime(replays, ns=(now, now))
        return found

    monkeypatch.setattr(database.State, "segments", publish_after_listing)
    database.build(trace.path)
    assert not database.is_fresh(trace.path)
    monkeypatch.undo()
    database.build(trace.path)
    assert database.is_fresh(trace.path)


def test_json_stays_json_where_a_number_is_none(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace()
    query = "select 'nan'::double as x, 'inf'::float as y, [1.5, 'nan'::double] as z, 2 as n"
    assert main(["sql", str(trace.path), query, "--format", "json"]) == 0

    def refuse(name: str) -> None:
        raise ValueError(name)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == [{"x": None, "y": None, "z": [1.5, None], "n": 2}]


@pytest.mark.parametrize(
    ("name", "begins"), [("a.json", '[{"x"'), ("a.csv", "x\n7"), ("a", "x\n7")]
)
def test_the_files_name_chooses_the_form(
    synthetic_trace: SyntheticTrace, tmp_path: Path, name: str, begins: str
) -> None:
    out = tmp_path / name
    assert main(["sql", str(synthetic_trace().path), "select 7 as x", "--out", str(out)]) == 0
    assert out.read_text().startswith(begins)


def test_a_file_that_cannot_be_written_is_one_line(
    synthetic_trace: SyntheticTrace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "missing/a.csv"
    assert main(["sql", str(synthetic_trace().path), "select 7 as x", "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_threads_that_build_at_once_do_not_meet(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace()
    (trace.path / "trace.duckdb").unlink()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda _: trace.sql("select count(*) as n from rows").to_pylist(), range(8)
        )
    assert list(found) == [[{"n": 43}]] * 8


def test_without_a_query_the_verb_says_what_there_is_to_ask(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(synthetic_trace().path)
    assert main(["sql", path]) == 0
    out = capsys.readouterr().out
    for name in ("kv_events", "sink_tokens", "key_attention", "mass(row, layer, head, from, to)"):
        assert name in out
    assert not (Path(path) / "cache").exists()
    assert main(["sql", path, "--describe", "Head_Summary"]) == 0
    assert "sink_share" in capsys.readouterr().out
    assert main(["sql", path, "--describe", "nothing"]) == 1
    assert "table 'nothing' was not found" in capsys.readouterr().err
    assert main(["sql", path, "--derive"]) == 0
    assert capsys.readouterr().out == ""
    assert (Path(path) / "cache/derived/1/head_attention.parquet").exists()
