"""Block streams of KV events and of recorded runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
import kvtrace.cli
from kvtrace.errors import InputError
from kvtrace.writer import TraceWriter
from kvtrace_viewer.blocks import read_stream, replay_blocks


def recorded(path: Path, sequences: list[tuple[list[int], int]]) -> kvtrace.Trace:
    """A synthetic recording: the tokens of each request, and how many of them are its prompt."""
    with TraceWriter(path, source="synthetic", detail="events") as writer:
        model = writer.add_model(name="m", num_layers=0)
        for number, (tokens, prompt) in enumerate(sequences):
            count = len(tokens)
            writer.append(
                "requests",
                {
                    "request": [number],
                    "run": [0],
                    "model": [model],
                    "prompt_tokens": [prompt],
                    # They came in the opposite order.
                    "started_ns": [100 - number],
                },
            )
            writer.append("steps", {"step": [number], "run": [0], "model": [model]})
            rows = np.arange(writer.rows, writer.rows + count)
            shared: dict[str, Any] = {"request": [number] * count, "position": np.arange(count)}
            writer.append("tokens", {**shared, "token_id": tokens, "row": rows})
            step = [number] * count
            writer.append(
                "rows", {**shared, "row": rows, "step": step, "has_query": [False] * count}
            )
    return kvtrace.open(path)


def test_tokens_of_requests_are_cut_into_blocks_of_any_size(tmp_path: Path) -> None:
    first, second = [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9, 6, 7]
    trace = recorded(tmp_path / "a.kvtrace", [(second, 3), (first, 7), ([5, 6], 2)])
    stream = read_stream(trace, 2)
    # 5 6 behind 1 2 3 4 is another block than 5 6 alone, and 7 behind another prefix is not 7.
    parts = [part.tolist() for part in np.split(stream.blocks, stream.starts[1:-1])]
    assert parts == [[0], [1, 2, 3, 4], [1, 2, 5, 6]]
    assert stream.tokens.tolist() == [2, 2, 2, 2, 1, 2, 2, 2, 1]
    assert stream.is_output.tolist() == [False] * 7 + [True] * 2
    assert stream.prompt_tokens.tolist() == [2, 7, 3]
    assert stream.arrival_ns.tolist() == [98, 99, 100]
    (vllm,) = replay_blocks(stream, ["vllm"], [20])
    assert (vllm.hits, vllm.accesses) == (1, 5)
    # Without a recorded cache of blocks, vLLM's default.
    assert read_stream(trace).block_size == 16
    with pytest.raises(InputError, match="block size 0 holds no token"):
        read_stream(trace, 0)


def test_kv_events_are_accesses(tmp_path: Path) -> None:
    def stored(hashes: list[int], parent: int | None, **more: Any) -> dict[str, Any]:
        event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent}
        tokens = list(range(4 * len(hashes)))
        return {**event, "token_ids": tokens, "block_size": 4, "lora_id": None, **more}

    batches = [
        [1.0, [stored([10, 11], None, medium="GPU"), stored([12], 11, medium="GPU")], 0],
        [2.0, [stored([10, 11], None, medium="CPU")], 0],
        [3.0, [{"type": "BlockRemoved", "block_hashes": [12], "medium": "GPU"}], 0],
        [4.0, [stored([10], None, medium="GPU"), stored([13], 11, medium="GPU")], 0],
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(map(json.dumps, batches)))
    out = tmp_path / "a.kvtrace"
    assert kvtrace.cli.main(["import", "kv-events", str(source), "--out", str(out)]) == 0
    stream = read_stream(kvtrace.open(out))
    parts = [part.tolist() for part in np.split(stream.blocks, stream.starts[1:-1])]
    assert parts == [[0, 1, 2], [0], [3]]
    assert (stream.block_size, stream.prompt_tokens.tolist()) == (4, [12, 4, 4])
    (lru,) = replay_blocks(stream, ["lru"], [2])
    assert "a hit is in them only where the engine reports it" in lru.notes[0]
    with pytest.raises(InputError, match=r"blocks of 4 tokens, known by their hashes; 8 was"):
        read_stream(kvtrace.open(out), 8)


def test_a_trace_without_blocks_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.kvtrace", source="synthetic", detail="events"):
        pass
    with pytest.raises(InputError, match="says of no block who asked for it"):
        read_stream(kvtrace.open(tmp_path / "a.kvtrace"))
