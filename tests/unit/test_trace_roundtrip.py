"""Whatever is written is read back equal: ragged requests, any text, any type, any position."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrace
from kvtrace import arrays
from kvtrace.writer import LayerSpec, TraceWriter

SPEC = LayerSpec(0, 2, 1, 4, 4, 0.5)
#: Text as tokenizers give it: any character, and bytes that are none.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(["<0xE2>", "▁", "", "\x00", "\N{PILE OF POO}", "ﷺ", "e\u0301"]),
    st.none(),
)
#: Per request: tokens of its prompt (also none), and of each later step.
REQUESTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=8, deadline=None)
@given(
    requests=REQUESTS,
    dtype=st.sampled_from(["float16", "float32"]),
    data=st.data(),
)
def test_requests_of_any_length_come_back(
    requests: list[list[int]], dtype: str, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 1000))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 64)
        patch.setattr(arrays, "CHUNKS_PER_SHARD", 2)
        patch.setattr(arrays, "TAIL_BYTES", 256)
        path = Path(folder) / "x.kvtrace"
        rng = np.random.default_rng(seed)
        kept: dict[int, list[np.ndarray]] = {n: [] for n in range(len(requests))}
        texts: dict[int, list[str | None]] = {n: [] for n in range(len(requests))}
        with TraceWriter(path, source="synthetic", dtype=dtype) as writer:
            model = writer.add_model(name="synthetic")
            writer.add_layers(model, [SPEC])
            for number, steps in enumerate(requests):
                columns = {"request": [number], "model": [model], "prompt_tokens": [steps[0]]}
                writer.append("requests", columns)
            for step in range(max(map(len, requests))):
                live = [(n, s[step]) for n, s in enumerate(requests) if step < len(s) and s[step]]
                if live:
                    _write_step(writer, model, step, live, kept, texts, rng, data)
                    writer.commit()
        trace = kvtrace.open(path)
        assert [one.request for one in trace.requests()] == [n for n in kept if kept[n]]
        for number, parts in kept.items():
            if not parts:
                continue
            want = np.concatenate(parts)
            found = trace.layer_data(0, number)
            assert found.k is not None
            np.testing.assert_array_equal(found.k[:, 0], want)
            tokens = trace.tokens(number)
            assert tokens["text"].to_pylist() == texts[number]
            assert tokens["position"].to_pylist() == list(range(len(want)))


def _write_step(
    writer: TraceWriter,
    model: int,
    step: int,
    live: list[tuple[int, int]],
    kept: dict[int, list[np.ndarray]],
    texts: dict[int, list[str | None]],
    rng: np.random.Generator,
    data: st.DataObject,
) -> None:
    of = [number for number, count in live for _ in range(count)]
    position = [len(texts[number]) + i for number, count in live for i in range(count)]
    at = np.arange(writer.rows, writer.rows + len(of))
    writer.append("steps", {"step": [step], "model": [model], "num_tokens": [len(of)]})
    writer.append(
        "rows",
        {
            "row": at,
            "step": [step] * len(of),
            "request": of,
            "position": position,
            "has_query": [True] * len(of),
        },
    )
    text = data.draw(st.lists(TEXTS, min_size=len(of), max_size=len(of)))
    tokens: dict[str, Any] = {"request": of, "position": position, "text": text, "row": at}
    writer.append("tokens", {**tokens, "token_id": at})
    k = rng.normal(size=(len(of), 1, 4)).astype(writer.dtype)
    q = np.repeat(k, 2, axis=1)
    writer.append_layer(model, 0, q=q, k=k, v=k, lse=np.zeros((len(of), 2), "f4"))
    for number, _ in live:
        mine = np.array(of) == number
        kept[number].append(k[mine, 0].astype(np.float32))
        texts[number] += [one for one, own in zip(text, mine, strict=True) if own]


def test_a_million_positions(tmp_path: Path) -> None:
    count = 1_000_000
    with TraceWriter(tmp_path / "x.kvtrace", source="synthetic", detail="events") as writer:
        model = writer.add_model(name="synthetic")
        writer.append("requests", {"request": [0], "model": [model], "prompt_tokens": [count]})
        writer.append("steps", {"step": [0], "model": [model], "num_tokens": [count]})
        at = np.arange(count)
        zero = np.zeros(count, np.int64)
        writer.append(
            "rows",
            {
                "row": at,
                "step": zero,
                "request": zero,
                "position": at.astype(np.int32),
                "has_query": np.zeros(count, bool),
            },
        )
        columns = {"request": zero, "position": at.astype("i4"), "token_id": at.astype("i4")}
        writer.append("tokens", {**columns, "row": at})
    trace = kvtrace.open(tmp_path / "x.kvtrace")
    (one,) = trace.requests()
    assert (one.tokens, one.prompt_tokens) == (count, count)
    assert (trace.request_rows(0) == at).all()
    found = trace.sql(f"select token_id from tokens where position = {count - 1}")
    assert found.to_pylist() == [{"token_id": count - 1}]
