"""A model on a GPU: outputs unchanged, rows as those of synchronous copies, CUDA graphs.

The order in which streams are asked is tested without one in test_recorder_off_device.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny import IDS, greedy, llama
from transformers import StaticCache

import kvtrace
from kvtrace_recorder import record
from kvtrace_recorder.session import off_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

BATCH = torch.cat([IDS, IDS.flip(1)])


@pytest.fixture
def model() -> Any:
    """The tiny Llama, on the GPU."""
    return llama().to("cuda")


def arrays(path: Path) -> list[Any]:
    trace = kvtrace.open(path)
    found: list[Any] = []
    for request in range(len(trace.requests())):
        for layer in range(2):
            data = trace.layer_data(layer, request)
            found += [data.q, data.k, data.v, data.lse]
    return found


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_outputs_are_unchanged_and_attention_is_the_model_s(kernel: str, tmp_path: Path) -> None:
    model = llama(attn_implementation=kernel).to("cuda")
    ids = BATCH.cuda()
    plain = greedy(model, ids)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        assert torch.equal(greedy(model, ids), plain)
    assert recording.gaps == {}
    eager = llama(attn_implementation="eager").to("cuda")
    with torch.no_grad():
        own = eager(plain[:, :-1], output_attentions=True).attentions
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    for layer, expected in enumerate(own):
        for request in range(2):
            for head in range(4):
                found = trace.attention(layer, head, request=request)
                # The GPU may round products of float32 more than a CPU does.
                np.testing.assert_allclose(found, expected[request, head].cpu(), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_is_that_of_synchronous_copies(
    dtype: torch.dtype, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model.to(dtype)

    def run(name: str) -> list[Any]:
        with record(model, tmp_path / name, strict=True) as recording:
            greedy(model, BATCH.cuda())
            greedy(model, IDS.cuda(), max_new_tokens=150)
            greedy(model, IDS.repeat(1, 40).cuda())
        assert recording.gaps == {}
        return arrays(tmp_path / name)

    late = run("late.kvtrace")

    def refuse(*args: Any) -> Any:
        raise RuntimeError("no pages")

    monkeypatch.setattr(off_device.TorchCalls, "pinned", refuse)
    for one, other in zip(run("plain.kvtrace"), late, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_on_a_stream_of_its_own(model: Any, tmp_path: Path) -> None:
    plain = greedy(model, IDS.cuda())
    with record(model, tmp_path / "default", strict=True):
        greedy(model, IDS.cuda())
    with (
        record(model, tmp_path / "own", strict=True) as recording,
        torch.cuda.stream(torch.cuda.Stream()),  # type: ignore[no-untyped-call]
    ):
        assert torch.equal(greedy(model, IDS.cuda()), plain)
    assert recording.gaps == {}
    for one, other in zip(arrays(tmp_path / "default"), arrays(tmp_path / "own"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_compiled_with_cuda_graphs_rows_are_recorded_between_the_graphs(
    model: Any, tmp_path: Path
) -> None:
    compiled: Any = torch.compile(model, mode="reduce-overhead")

    def run() -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=64)
        found = []
        with torch.no_grad():
            for at in range(12):
                ids = IDS[:, at % 6 : at % 6 + 1].cuda()
                found.append(compiled(ids, past_key_values=cache, use_cache=True).logits.clone())
        return torch.cat(found)

    plain = run()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        assert torch.equal(run(), plain)
    assert (recording.gaps, recording.rows) == ({}, 12)
    assert torch.equal(run(), plain)


def test_a_graph_of_the_user_s_own_is_a_gap_and_stays_whole(model: Any, tmp_path: Path) -> None:
    ids = IDS.cuda()
    with torch.no_grad(), record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for _ in range(3):
                plain = model(ids, use_cache=False).logits
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = model(ids, use_cache=False).logits
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(found, plain)
    assert recording.rows == 3 * IDS.shape[1]
    assert "a CUDA graph was made of the model" in next(iter(recording.gaps))
