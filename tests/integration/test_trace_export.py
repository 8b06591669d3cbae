"""Exports say what the trace says, in the forms of others."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from transformers import LlamaConfig, LlamaForCausalLM

import kvtrace
from kvtrace.cli import main
from kvtrace.export import attention, map_files
from kvtrace.export.attention import Choice, export_attention
from kvtrace.tables import arrow_schemas, columns
from kvtrace_recorder import record

#: The names of OpenTelemetry's conventions for generative models.
GEN_AI_NAMES = {
    value for value in vars(gen_ai_attributes).values() if str(value).startswith("gen_ai.")
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> kvtrace.Trace:
    """Two prompts in a batch and one alone, by a tiny model with random weights."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=None,
        )
    ).eval()
    path = tmp_path_factory.mktemp("export") / "tiny.kvtrace"
    with record(model, path, strict=True):
        model.generate(torch.arange(5, 25).reshape(2, 10), max_new_tokens=5, do_sample=False)
        model.generate(torch.arange(3, 10)[None], max_new_tokens=4, do_sample=False)
    return kvtrace.open(path)


@pytest.fixture
def trace(recorded: kvtrace.Trace, tmp_path: Path) -> kvtrace.Trace:
    """A copy to write beside."""
    return kvtrace.open(shutil.copytree(recorded.path, tmp_path / "tiny.kvtrace"))


def maps(path: Path) -> dict[str, Any]:
    """The arrays of an export, by name."""
    if path.suffix == ".npz":
        with np.load(path) as found:
            return dict(found)
    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(array[...]) for name, array in group.arrays()}


@pytest.mark.parametrize("name", ["maps.npz", "maps.zarr"])
def test_maps_are_the_traces_own(
    trace: kvtrace.Trace, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks a map.
    monkeypatch.setattr(map_files, "BLOCK_CELLS", 30)
    words = ["--layers", "0,2", "--heads", "1-2", "--rows", "3-12", "--keys", "0,2-9"]
    out = tmp_path / name
    command = ["export", str(trace.path), "--attention", "--out", str(out), "--request", "1"]
    assert main([*command, *words]) == 0
    found = maps(out)
    rows, keys = np.arange(3, 13), np.array([0, *range(2, 10)])
    for layer in (0, 2):
        for index, head in enumerate((1, 2)):
            own = trace.attention(layer, head, rows=rows, keys=keys, request=1)
            np.testing.assert_allclose(found[f"layer_{layer}"][index], own, atol=1e-6)
    assert "layer_1" not in found
    if name.endswith("npz"):
        assert found["layer_2_keys"].tolist() == keys.tolist()
        assert json.loads(str(found["about"]))["request"] == 1
    else:
        about = dict(zarr.open_group(out, mode="r").attrs)
        assert about["layers"]["layer_2"]["rows"] == rows.tolist()  # type: ignore[call-overload, index]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_rows_without_a_query_are_unknown(trace: kvtrace.Trace, tmp_path: Path) -> None:
    data = trace.layer_data(0, 0)
    assert data.lse is not None
    data.lse[4] = np.nan
    found = attention._weights(trace, data, 0, np.arange(8), np.arange(8))
    assert np.isnan(found[4]).all()
    assert np.isfinite(found[5]).all()
    whole = tmp_path / "all.npz"
    assert export_attention(trace, whole, Choice(2)) == ["layer_0", "layer_1", "layer_2"]
    assert maps(whole)["layer_1"].shape == (4, 10, 10)
    np.testing.assert_allclose(maps(whole)["layer_1"].sum(axis=2), 1, atol=1e-2)


def test_nothing_is_overwritten_unasked(
    trace: kvtrace.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["export", str(trace.path)]
    for words, out in (
        (["--attention", "--out"], "m.npz"),
        (["--attention", "--out"], "m.zarr"),
        (["--tables"], "tables"),
        (["--perfetto"], "p.json"),
        (["--otel"], "o.json"),
    ):
        command = [*base, *words, str(tmp_path / out)]
        assert main(command) == 0
        capsys.readouterr()
        assert main(command) == 1
        assert "exists; a new path was expected" in capsys.readouterr().err
        assert main([*command, "--force"]) == 0


def test_mistakes_are_told(
    trace: kvtrace.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--attention", "--out", str(tmp_path / "m.npz")]
    for words, said in (
        ([], "nothing to write was named"),
        (["--attention"], "--attention and --out go together"),
        ([*out, "--layers", "7"], "layer 7 was not found in request 0"),
        ([*out, "--heads", "9"], "head 9 was not found in layer 0; it has 0-3"),
        ([*out, "--rows", "5-99"], "rows 5 to 99 were asked for; the request has 0 to 13"),
        ([*out, "--rows", "5:9"], "numbers from 0 and ranges were expected"),
        ([*out, "--request", "9"], "request 9 was not found"),
        (["--attention", "--out", str(tmp_path / "m.csv")], "neither .zarr nor .npz"),
        (["--otel", str(trace.path / "manifest.json" / "o.json")], "cannot be written"),
    ):
        assert main(["export", str(trace.path), *words]) == 1
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.kvtrace"]


def test_tables_are_whole_and_commented(trace: kvtrace.Trace, tmp_path: Path) -> None:
    assert main(["export", str(trace.path), "--tables", str(tmp_path / "tables")]) == 0
    for name in arrow_schemas():
        found = pq.read_table(tmp_path / "tables" / f"{name}.parquet")
        assert found.equals(trace.table(name)), name
    (column,) = [c for c in columns() if (c.table, c.name) == ("rows", "has_query")]
    schema = pq.read_schema(tmp_path / "tables/rows.parquet")
    assert schema.field("has_query").metadata[b"comment"].decode() == column.comment


def timeline(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, checked against its format."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    needed = {"X": {"ts", "dur", "tid"}, "b": {"ts", "id2", "cat"}, "e": {"ts", "id2", "cat"}}
    needed |= {"C": {"ts", "args"}, "M": {"args"}}
    open_slices: dict[tuple[int, str], list[str]] = {}
    for event in found:
        assert {"ph", "name", "pid"} | needed[event["ph"]] <= set(event)
        assert event.get("ts", 0) >= 0
        if event["ph"] == "b":
            open_slices.setdefault((event["pid"], event["id2"]["local"]), []).append(event["name"])
        elif event["ph"] == "e":
            # Slices of one id nest.
            assert open_slices[event["pid"], event["id2"]["local"]].pop() == event["name"]
    assert not any(open_slices.values())
    return found


def test_the_timeline_has_every_step_request_and_byte(trace: kvtrace.Trace, tmp_path: Path) -> None:
    for name in ("t.json", "t.json.gz"):
        assert main(["export", str(trace.path), "--perfetto", str(tmp_path / name)]) == 0
    found = timeline(tmp_path / "t.json")
    assert found == timeline(tmp_path / "t.json.gz")
    steps = trace.table("steps").to_pylist()
    shown = [event for event in found if event["ph"] == "X"]
    assert [event["name"] for event in shown] == [step["phase"] for step in steps]
    first = min(row["started_ns"] for row in trace.table("requests").to_pylist())
    begin = min(first, steps[0]["started_ns"])
    for event, step in zip(shown, steps, strict=True):
        assert event["ts"] == (step["started_ns"] - begin) / 1000
        assert event["dur"] == step["duration_ns"] / 1000
    begun = Counter(event["name"] for event in found if event["ph"] == "b")
    assert begun == {f"request {n}": 1 for n in range(3)} | {"prefill": 3, "decode": 3}
    memory = [event["args"]["bytes"] for event in found if event["ph"] == "C"]
    # Keys and values of 2 heads of width 8 in float32, in 3 layers, of 2 x 14 and of 10 tokens.
    assert max(memory) == 2 * 14 * 3 * 2 * 2 * 8 * 4
    assert memory[-1] in (0, 10 * 3 * 2 * 2 * 8 * 4)


def test_spans_are_the_requests(trace: kvtrace.Trace, tmp_path: Path) -> None:
    assert main(["export", str(trace.path), "--otel", str(tmp_path / "o.json")]) == 0
    (resource,) = json.loads((tmp_path / "o.json").read_text())["resourceSpans"]
    (scope,) = resource["scopeSpans"]
    spans = scope["spans"]
    assert len({span["traceId"] for span in spans}) == 3
    for span, request in zip(spans, trace.requests(), strict=True):
        assert (len(span["traceId"]), len(span["spanId"])) == (32, 16)
        assert int(span["startTimeUnixNano"]) < int(span["endTimeUnixNano"])
        values = {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}
        assert values["gen_ai.usage.input_tokens"] == str(request.prompt_tokens)
        assert values["gen_ai.usage.output_tokens"] == str(request.tokens - request.prompt_tokens)
        assert values["gen_ai.operation.name"] == "text_completion"
        # Ours stand apart; the others are the conventions' own.
        assert {key for key in values if not key.startswith("kvtrace.")} <= GEN_AI_NAMES
