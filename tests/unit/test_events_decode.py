"""KV-event messages in every form that is out there, and the forms of a dump."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

import kvtrace
import kvtrace.cli
from kvtrace_recorder.importers.kv_events import decode
from kvtrace_recorder.importers.kv_events.records import read_record, unpack
from kvtrace_recorder.importers.kv_events.watch import SequenceWatch, Source

STORED = {
    "type": "BlockStored",
    "block_hashes": [b"\x01" * 4, b"\x02" * 4],
    "parent_block_hash": b"\x00" * 4,
    "token_ids": [1, 2, 3, 4, 5, 6, 7, 8],
    "block_size": 4,
    "lora_id": 3,
    "medium": "GPU",
    "lora_name": "poet",
    "extra_keys": [["image"], None],
    "group_idx": 1,
    "kv_cache_spec_kind": "full_attention",
    "session_id": "s1",
    "not_invented_yet": 7,
}


def one(message: Any) -> Any:
    """The only event of a message that decodes without a problem."""
    batch = decode.decode_batch(unpack(msgpack.packb(message)))
    assert not batch.problems
    (event,) = batch.events
    return event


def imported(tmp_path: Path, content: bytes, name: str = "dump") -> kvtrace.Trace:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / f"{name}.kvtrace"
    words = ["import", "kv-events", str(tmp_path / name), "--out", str(out), "--force"]
    assert kvtrace.cli.main(words) == 0
    return kvtrace.open(out)


def events(trace: kvtrace.Trace) -> list[tuple[str, int | None, str | None]]:
    return [(r["event"], r["block"], r["device"]) for r in trace.table("kv_events").to_pylist()]


@pytest.mark.parametrize("envelope", ["array", "map"])
def test_a_map_event_keeps_every_field(envelope: str) -> None:
    array = [1.5, [STORED], 2]
    message = array if envelope == "array" else {"ts": 1.5, "events": [STORED]}
    event = one(message)
    assert event.block_hashes == ["01010101", "02020202"]
    assert event.parent_block_hash == "00000000"
    assert event.token_ids == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (event.block_size, event.medium, event.group_idx) == (4, "gpu", 1)
    assert event.session == "s1"
    rest = {"lora_id": 3, "lora_name": "poet", "kv_cache_spec_kind": "full_attention"}
    rest["not_invented_yet"] = 7
    assert event.details == [rest | {"extra_keys": ["image"]}, rest]


def test_an_array_event_of_any_length() -> None:
    short = one([1.5, [["BlockStored", [7, 2**64 - 1], None, [1, 2], 1, None]]])
    assert short.block_hashes == ["7", "18446744073709551615"]
    assert (short.medium, short.details) == (None, [{}, {}])
    # SGLang puts a map of further fields where vLLM has the name of the LoRA.
    salted = one([1.5, [["BlockStored", [-7], 5, [1], 1, None, "CPU", {"session_id": "s"}]], 0])
    assert (salted.block_hashes, salted.session, salted.medium) == (["-7"], "s", "cpu")
    names = ["poet", [None], 1, "mla", None, "new", "newer"]
    long = one([1.5, [["BlockStored", [7], None, [1], 1, 2, "GPU", *names]], 0])
    assert long.group_idx == 1
    expected = {"lora_id": 2, "lora_name": "poet", "kv_cache_spec_kind": "mla"}
    assert long.details == [expected | {"further_fields": ["new", "newer"]}]


def test_removed_and_cleared_in_both_forms() -> None:
    removed = decode.BlockRemoved(["7"], "gpu", None)
    assert one([1, [["BlockRemoved", [7], "GPU"]]]) == removed
    assert one([1, [{"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"}]]) == removed
    assert one([1, [["AllBlocksCleared"]]]) == decode.AllBlocksCleared(None)
    assert one([1, [{"type": "AllBlocksCleared"}]]) == decode.AllBlocksCleared(None)


def test_the_last_block_may_be_partly_full() -> None:
    partly = one([1, [["BlockStored", [1, 2], None, [1, 2, 3], 2, None]]])
    assert partly.token_ids == [[1, 2], [3]]


def test_a_bad_event_costs_itself_only() -> None:
    bad = [
        ["BlockInactive", [7]],
        ["BlockStored", [7], None, [1], 0, None],
        ["BlockStored", [7.5], None, [1], 1, None],
        ["BlockRemoved", "7"],
        7,
        {"block_hashes": [7]},
    ]
    batch = decode.decode_batch([1, [*bad, ["BlockRemoved", [7]]], 0])
    assert len(batch.events) == 1
    assert len(batch.problems) == len(bad)
    assert batch.problems[0] == ("kv events", "unknown event type BlockInactive")


def test_token_ids_that_nobody_can_share_out_are_a_problem_not_a_guess() -> None:
    batch = decode.decode_batch([1, [["BlockStored", [1, 2], None, [1] * 9, 2, None]], 0])
    assert batch.events[0].token_ids is None  # type: ignore[union-attr]
    assert batch.problems == [("token ids", "token_ids that do not divide over their blocks")]


@pytest.mark.parametrize("ts", [1.7e9, 1.7e12, 1.7e15, 17 * 10**17])
def test_times_come_in_several_units(ts: float) -> None:
    assert decode.decode_batch([ts, []]).ts_ns == 17 * 10**17


@pytest.mark.parametrize("message", [7, [], [1.5], [1.5, 7], {"ts": 1}, ["x", []], [-1, []]])
def test_what_is_no_message_is_refused(message: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode.decode_batch(message)


def test_a_low_number_is_a_restart_only_with_a_newer_time() -> None:
    watch, source = SequenceWatch(), Source("", None)
    watch.accept(source, 5, 100)
    assert watch.judge(source, 6, 101).missing == range(6, 6)
    assert watch.judge(source, 9, 101).missing == range(6, 9)
    assert watch.judge(source, 2, 40).duplicate
    assert watch.judge(source, 5, 100).duplicate
    restart = watch.judge(source, 2, 101)
    assert (restart.restarted, restart.missing) == (True, range(2))
    assert watch.judge(Source("other", None), 0, 1).missing == range(0)


EVENT = {"type": "BlockStored", "block_hashes": [1], "token_ids": [5], "block_size": 1}


@pytest.mark.parametrize(
    "record",
    [
        {"ts": 1.0, "events": [EVENT], "seq": 4},
        {"topic": "", "sequence": 4, "payload": [1.0, [EVENT], 0]},
        [b"", 4, msgpack.packb([1.0, [EVENT], 0])],
        ["", (4).to_bytes(8, "big"), [1.0, [["BlockStored", [1], None, [5], 1]]]],
    ],
)
def test_records_with_a_number(record: Any) -> None:
    found = read_record(record)
    assert found.sequence == 4
    assert len(found.batch.events) == 1


@pytest.mark.parametrize("record", [[1.0, [EVENT]], EVENT, ["BlockRemoved", [1], "GPU"]])
def test_records_without_a_number(record: Any) -> None:
    found = read_record(record)
    assert found.sequence is None
    assert len(found.batch.events) == 1


def test_a_dump_of_json_lines(tmp_path: Path) -> None:
    lines = [
        [10.0, [["BlockStored", [1, 2], None, [1, 2, 3, 4], 2, None, "GPU"]], 0],
        {"ts": 11.0, "events": [EVENT | {"medium": "CPU"}, {"type": "Odd"}]},
        "nonsense",
        [12.0, [["BlockStored", [2], 1, [3, 4], 2, None, "GPU"]], 0],
        {"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU", "ts": 13.0, "dp_rank": 0},
        [14.0, [["AllBlocksCleared"]], 0],
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n\n"
    trace = imported(tmp_path, text.encode())
    # Rank 0 and no rank are two sources: their blocks are two, though the hash is one.
    assert events(trace) == [
        ("store", 0, "gpu"),
        ("store", 1, "gpu"),
        ("store", 2, "cpu"),
        ("touch", 1, "gpu"),
        ("remove", 1, "gpu"),
        ("clear", None, None),
        ("clear", 0, "gpu"),
    ]
    gaps = {(row["what"], row["count"], row["reason"]) for row in trace.table("gaps").to_pylist()}
    assert gaps == {
        ("kv events", 1, "unknown event type Odd (line 2)"),
        ("lines of the dump", 1, "neither a map nor an array (line 3)"),
        ("lines of the dump", 1, "no JSON (line 7)"),
    }
    blocks = trace.table("blocks").to_pylist()
    assert [row["hash"] for row in blocks] == ["1", "2", "1"]
    assert [row["token_ids"] for row in blocks] == [[1, 2], [3, 4], [5]]
    assert [row["parent"] for row in blocks] == [None, 0, None]
    assert trace.manifest.source == "imported"
    assert trace.status == "complete"


def test_packed_gzipped_and_plain_dumps_say_the_same(tmp_path: Path) -> None:
    messages = [[b"kv", n, msgpack.packb([n + 1.5, [STORED], 1])] for n in (3, 4, 4, 7)]
    packed = b"".join(map(msgpack.packb, messages))
    plain = imported(tmp_path, packed, "plain")
    zipped = imported(tmp_path, gzip.compress(packed), "zipped")
    assert events(plain) == events(zipped)
    assert [event for event, *_ in events(plain)] == ["store"] * 2 + ["touch"] * 4
    gaps = [(row["count"], row["reason"]) for row in plain.table("gaps").to_pylist()]
    name = "publisher (topic kv, rank 1), sequence"
    assert gaps == [(3, f"{name} 0 to 2: not in the dump"), (2, f"{name} 5 to 6: not in the dump")]
    (request,) = plain.table("requests").to_pylist()
    assert (request["external_id"], request["started_ns"]) == ("s1", 4_500_000_000)
    details = json.loads(plain.table("blocks").to_pylist()[0]["details"])
    assert details["topic"] == "kv"
    assert (details["data_parallel_rank"], details["lora_name"]) == (1, "poet")


def test_a_parent_that_was_never_stored_keeps_its_hash(tmp_path: Path) -> None:
    line = json.dumps([1.0, [["BlockStored", [2], 1, [5], 1, None, "GPU"]], 0])
    trace = imported(tmp_path, line.encode())
    found = trace.sql(
        "select b.hash, p.hash parent from blocks b join blocks p on b.parent = p.block"
    )
    assert found.to_pylist() == [{"hash": "2", "parent": "1"}]


@pytest.mark.parametrize("cut", [1, 7])
def test_a_dump_that_was_cut_off_keeps_what_came_before(tmp_path: Path, cut: int) -> None:
    packed = msgpack.packb([b"", 0, msgpack.packb([1.5, [STORED], 1])])
    trace = imported(tmp_path, packed * 1 + packed[:-cut])
    assert len(events(trace)) == 2
    (gap,) = trace.table("gaps").to_pylist()
    assert (gap["what"], gap["reason"]) == (
        "records of the dump",
        "cut off in the middle (record 2)",
    )


def test_a_cut_gzip_keeps_what_came_before(tmp_path: Path) -> None:
    line = json.dumps([1.0, [EVENT], 0]).encode() + b"\n"
    trace = imported(tmp_path, gzip.compress(line * 1000)[:-9])
    assert trace.table("kv_events").num_rows > 0
    assert "ends badly" in trace.table("gaps").to_pylist()[0]["reason"]


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\xc1\xc1", b"[1, 2]\n{}\n", b"\x93\x01"])
def test_a_file_without_events_makes_no_trace(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dump").write_bytes(content)
    out = tmp_path / "out.kvtrace"
    words = ["import", "kv-events", str(tmp_path / "dump"), "--out", str(out)]
    assert kvtrace.cli.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "holds no KV events" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kvtrace_recorder.importers.kv_events as package

    monkeypatch.setattr(package, "find_spec", lambda name: None)
    words = ["import", "kv-events", "tcp://localhost:1", "--out", str(tmp_path / "a.kvtrace")]
    assert kvtrace.cli.main(words) == 1
    assert "pip install 'kvtrace[events]'" in capsys.readouterr().err


def test_live_options_are_refused_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", "kv-events", "dump", "--for", "3", "--out", str(tmp_path / "a.kvtrace")]
    assert kvtrace.cli.main(words) == 1
    assert "--for with the file dump" in capsys.readouterr().err


def test_a_dump_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dump").write_bytes(b"precious")
    words = ["import", "kv-events", "tcp://127.0.0.1:9", "--dump", str(tmp_path / "dump")]
    assert kvtrace.cli.main([*words, "--out", str(tmp_path / "a.kvtrace")]) == 1
    assert "exists; a new file was expected for --dump" in capsys.readouterr().err
    assert (tmp_path / "dump").read_bytes() == b"precious"
    assert not (tmp_path / "a.kvtrace").exists()


@pytest.mark.parametrize("address", ["tcp://nowhere", "tcp://localhost:99999", "http://x:80"])
def test_a_bad_address_is_one_clear_line(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.kvtrace"
    assert kvtrace.cli.main(["import", "kv-events", address, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {address} cannot be used")
    assert not out.exists()
