"""kvtrace import mooncake, weka, lmcache and qwen-bailian."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
import kvtrace.cli
from kvtrace_recorder.importers.workloads import write
from kvtrace_recorder.importers.workloads.contents import chained, contents
from kvtrace_viewer.blocks import BlockStream, read_stream


def run(kind: str, source: Path, out: Path, *words: str) -> int:
    return kvtrace.cli.main(["import", kind, str(source), "--out", str(out), *words])


def imported(kind: str, source: Path, *words: str) -> kvtrace.Trace:
    out = source.parent / "out.kvtrace"
    assert run(kind, source, out, *words) == 0
    return kvtrace.open(out)


def lines(path: Path, records: list[Any]) -> Path:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("\n".join(texts) + "\n")
    return path


def requests_of(stream: BlockStream) -> list[list[int]]:
    parts = np.split(stream.blocks, stream.starts[1:-1])
    return [part.tolist() for part in parts]


def mooncake(at: int, tokens: int, ids: list[int], out: int = 5) -> dict[str, Any]:
    return {"timestamp": at, "input_length": tokens, "output_length": out, "hash_ids": ids}


def test_mooncake_comes_in_whole_and_bad_lines_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_COMMIT_ROWS", 4)
    source = lines(
        tmp_path / "a.jsonl",
        [
            mooncake(0, 1024, [7, 9]),
            "not JSON",
            mooncake(3, 1100, [7, 9, 1 << 40]),
            "",
            [1],
            mooncake(4, 1100, [7]),
            {**mooncake(4, 10, [7]), "timestamp": "now"},
            mooncake(4, 10, [7, 8]),
            {**mooncake(4, 10, [7]), "hash_ids": [None]},
            mooncake(9, 0, []),
            mooncake(12, 3, [11]),
        ],
    )
    trace = imported("mooncake", source)
    stream = read_stream(trace)
    assert requests_of(stream) == [[0, 1], [0, 1, 2], [], [3]]
    assert stream.tokens.tolist() == [512, 512, 512, 512, 76, 3]
    assert stream.is_full.tolist() == [True, True, True, True, False, False]
    assert stream.arrival_ns.tolist() == [0, 3_000_000, 9_000_000, 12_000_000]
    assert not stream.is_output.any()
    gaps = trace.sql("select what, sum(count)::int n from gaps group by 1 order by 1").to_pylist()
    assert gaps == [{"what": "lines", "n": 4}, {"what": "requests", "n": 2}]
    said = capsys.readouterr().err
    assert "2 lines left out: no JSON object (line 2, line 5)\n" in said
    assert "1 lines left out: no time timestamp (line 7)\n" in said
    assert "1 lines left out: no list hash_ids of hashes (line 9)\n" in said
    assert "2 requests left out: blocks do not fit tokens (line 6, line 8)\n" in said
    found = trace.sql("select request, sum(tokens) n from block_accesses group by 1 order by 1")
    assert found["n"].to_pylist() == [1024, 1100, 3]


def test_a_file_without_a_request_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lines(tmp_path / "a.jsonl", ["nothing", {"timestamp": 1}])
    assert run("mooncake", source, tmp_path / "b.kvtrace") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "holds no request (1 lines left out: no JSON object (line 1); 1 lines" in error[0]
    assert not (tmp_path / "b.kvtrace").exists()
    assert run("weka", tmp_path, tmp_path / "b.kvtrace") == 1
    assert run("lmcache", tmp_path / "nothing", tmp_path / "b.kvtrace") == 1


def test_qwen_bailian_may_be_gzipped_and_chained(tmp_path: Path) -> None:
    records = [
        {"chat_id": 3, "timestamp": 0.25, "input_length": 40, "output_length": 8, "hash_ids": ids}
        for ids in ([1, 2, 3], [4, 2, 5])
    ]
    source = tmp_path / "a.jsonl.gz"
    source.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    trace = imported("qwen-bailian", source)
    stream = read_stream(trace)
    assert requests_of(stream) == [[0, 1, 2], [3, 1, 4]]
    assert (stream.block_size, stream.arrival_ns[0]) == (16, 250_000_000)
    assert trace.table("requests")["external_id"].to_pylist() == ["3", "3"]
    # Block 2 behind 4 is not block 2 behind 1.
    again = read_stream(imported("qwen-bailian", source, "--chained", "--force"))
    assert requests_of(again) == [[0, 1, 2], [3, 4, 5]]
    assert chained([1, 2])[:1] == chained([1, 3])[:1]


def test_lmcache_reads_rotated_logs_and_keeps_models_apart(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()

    def lookup(model: str, hashes: list[str], tokens: int) -> dict[str, Any]:
        return {
            "timestamp": 1711929600.5,
            "request_id": "r",
            "model_name": model,
            "chunk_size": 256,
            "seq_len": tokens,
            "chunk_hashes": hashes,
        }

    long = "0x" + "ab" * 32
    lines(folder / "lookup_hashes_1.jsonl", [lookup("m", ["0xff", long], 600)])
    rest = [lookup("other", ["0xff"], 256), lookup("m", ["FF", long], 600), "broken"]
    lines(folder / "lookup_hashes_2.jsonl", rest)
    out = tmp_path / "out.kvtrace"
    assert run("lmcache", folder, out) == 0
    trace = kvtrace.open(out)
    stream = read_stream(trace)
    assert requests_of(stream) == [[0, 1], [2], [0, 1]]
    assert stream.namespaces == ("m", "other", "m")
    assert stream.prompt_tokens.tolist() == [600, 256, 600]
    (gap,) = trace.table("gaps").to_pylist()
    assert gap["reason"] == "no JSON object (lookup_hashes_2.jsonl, line 3)"


def test_weka_ids_are_valid_in_their_file_only(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()

    def request(at: float, tokens: int, ids: list[int]) -> dict[str, Any]:
        return {"t": at, "type": "n", "in": tokens, "out": 70, "hash_ids": ids}

    def conversation(name: str, requests: list[Any], **more: Any) -> None:
        found = {"id": name, "block_size": 64, "requests": requests, **more}
        (folder / f"{name}.json").write_text(json.dumps(found))

    nested = {"type": "subagent", "requests": [request(2.0, 64, [1])]}
    # The second request's blocks go on into what was generated.
    conversation("a", [request(0.0, 130, [1, 2]), request(1.5, 130, [1, 2, 3, 4]), nested])
    conversation("b", [request(0.0, 64, [1]), {"t": 0}], hash_id_scope="local")
    conversation("c", [request(0.0, 64, [1])], hash_id_scope="global")
    conversation("d", [request(0.0, 64, [1])], hash_id_scope="global")
    (folder / "e.json").write_text("{")
    out = tmp_path / "out.kvtrace"
    assert run("weka", folder, out) == 0
    trace = kvtrace.open(out)
    stream = read_stream(trace)
    assert requests_of(stream) == [[0, 1], [0, 1, 2, 3], [0], [4], [5], [5]]
    assert stream.tokens.tolist() == [64, 64, 64, 64, 64, 8, 64, 64, 64, 64]
    assert stream.is_output.tolist() == [False] * 5 + [True] + [False] * 4
    reasons = sorted(row["reason"] for row in trace.table("gaps").to_pylist())
    assert reasons == [
        "it cannot be read as JSON (e.json)",
        "no in of at least 0 (b.json, request 2)",
    ]


def test_contents_are_equal_where_hashes_and_namespaces_are() -> None:
    assert contents([5, -1, 1 << 62], None).tolist() == [5, -1, 1 << 62]
    assert contents(["0x5", "5", "f" * 16], None).tolist() == [5, 5, -1]
    assert contents([(1 << 64) - 1, 0], None).tolist() == [-1, 0]
    long = contents(["a" * 17, "a" * 17, "a" * 18, "+5", 1 << 70], None).tolist()
    assert long[0] == long[1]
    assert len(set(long)) == 4
    assert contents([5, 6], "x").tolist() == contents([5, 6], "x").tolist()
    assert len({*contents([5, 6], "x").tolist(), *contents([5, 6], "y").tolist()}) == 4
