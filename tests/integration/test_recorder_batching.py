"""Continuous batching, on tiny random models: rows, forks and blocks as the manager had them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import offloading_manager
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    CacheAllocator,
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.modeling_utils import PreTrainedModel

import kvtrace
from kvtrace import Trace
from kvtrace.block_tables import block_tables
from kvtrace.writer import TraceWriter
from kvtrace_recorder import histories, pipeline, record
from kvtrace_recorder.pipeline import Pipeline
from kvtrace_recorder.session.paged_cache import PagedCacheState

PAGE = 4
_GQA = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": _GQA,
    "Qwen3": {**_GQA, "head_dim": 16},
    # One cache group for each kind of layer.
    "GptOss": {
        **_GQA,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
Snapshot = tuple[int, dict[tuple[str, int], list[int]]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PATCHED: dict[type, tuple[str, ...]] = {
    ContinuousBatchProcessor: ("_generation_step", "update_batch", "prepare_next_batch"),
    PagedAttentionCache: ("update", "evict_cached_blocks", "reset"),
    CacheAllocator: ("fork_blocks", "free_blocks", "mark_complete_blocks"),
    FullAttentionCacheAllocator: ("allocate_cache_to_request",),
    SlidingAttentionCacheAllocator: ("allocate_cache_to_request",),
    offloading_manager.OffloadingManager: ("_offload_to_cpu", "restore_scheduled_requests"),
}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    def state() -> list[Any]:
        return [vars(kind).get(name) for kind, names in PATCHED.items() for name in names]

    before = state()
    yield
    assert state() == before


def build(family: str = "Llama", kernel: str = "sdpa") -> Any:
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    torch.manual_seed(7)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind._from_config(config, attn_implementation=kernel)
    # Small default weights make attention almost uniform; a wrong history would hide in it.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(6)
    return model.eval()


def prompts(*lengths: int, shared: int = 0) -> list[list[int]]:
    """Random prompts of these lengths, the first `shared` tokens the same."""
    draw = torch.Generator().manual_seed(5)
    first = torch.randint(3, 96, (shared,), generator=draw).tolist()
    return [
        first + torch.randint(3, 96, (length - shared,), generator=draw).tolist()
        for length in lengths
    ]


def batching(**options: Any) -> ContinuousBatchingConfig:
    given = {"page_size": PAGE, "num_blocks": 64, "max_batch_tokens": 48, **options}
    return ContinuousBatchingConfig(max_requests_per_batch=8, **given)


def sampling(new: int = 9, **options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, eos_token_id=-1, **{"do_sample": False, **options})


def generate(model: Any, inputs: list[list[int]], new: int = 9, **options: Any) -> dict[str, Any]:
    children = options.pop("children", 0)
    sampled = {"do_sample": True, "num_return_sequences": 1 + children} if children else {}
    found: dict[str, Any] = model.generate_batch(
        inputs,
        generation_config=sampling(new, **sampled),
        continuous_batching_config=batching(return_logprobs=True, **options),
    )
    return found


def answers(results: dict[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and the log-probabilities of each, which come from the logits."""
    return {name: (x.generated_tokens, x.logprobs) for name, x in results.items()}


class Snapshots:
    """The manager's own block tables, at every step and after every release of blocks."""

    def __init__(self) -> None:
        self.steps: list[Snapshot] = []
        self.releases: list[Snapshot] = []


def tables_of(cache: Any) -> Snapshot:
    tables = {
        (name, allocator.index): list(blocks)
        for allocator in cache.cache_allocators.values()
        for name, blocks in allocator.block_table.items()
        if blocks
    }
    return time.time_ns(), tables


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    taken = Snapshots()
    step, free = ContinuousBatchProcessor._generation_step, PagedAttentionCache.free_blocks

    def at_step(self: Any, *args: Any) -> Any:
        taken.steps.append(tables_of(self.cache))
        return step(self, *args)

    def at_release(self: Any, *args: Any, **kwargs: Any) -> None:
        free(self, *args, **kwargs)
        taken.releases.append(tables_of(self))

    monkeypatch.setattr(ContinuousBatchProcessor, "_generation_step", at_step)
    monkeypatch.setattr(PagedAttentionCache, "free_blocks", at_release)
    return taken


def names(trace: Trace) -> dict[int, str]:
    """The manager's ids, by number of the request."""
    found = trace.table("requests")
    return dict(zip(found["request"].to_pylist(), found["external_id"].to_pylist(), strict=True))


def events(trace: Trace, *kinds: str) -> list[dict[str, Any]]:
    return [e for e in trace.table("kv_events").to_pylist() if e["event"] in kinds]


def check_sequences(trace: Trace, results: dict[str, Any], *, missing: int = 1) -> None:
    """Every request's tokens are there: the prompt, and all answers but the last."""
    told = {r.request for r in trace.requests()}
    known = {name: number for number, name in names(trace).items() if number in told}
    assert set(known) == set(results)
    for name, result in results.items():
        tokens = trace.tokens(known[name])
        expected = result.prompt_ids + result.generated_tokens
        assert tokens["token_id"].to_pylist() == expected[: len(expected) - missing]
        assert tokens["position"].to_pylist() == list(range(len(expected) - missing))
        prompt = len(result.prompt_ids)
        sources = ["prompt"] * prompt + ["generated"] * (tokens.num_rows - prompt)
        assert tokens["source"].to_pylist() == sources
        request = next(r for r in trace.requests() if r.request == known[name])
        assert request.prompt_tokens == prompt


def check_attention(trace: Trace, model: Any) -> None:
    """Attention from the trace is that of an ordinary eager run over the same tokens."""
    model.set_attn_implementation("eager")
    for request in trace.requests():
        ids = torch.tensor([trace.tokens(request.request)["token_id"].to_pylist()])
        with torch.no_grad():
            own = model(ids, output_attentions=True).attentions
        for layer, expected in enumerate(own):
            for head in range(expected.shape[1]):
                found = trace.attention(layer, head, request=request.request)
                np.testing.assert_allclose(found, expected[0, head].numpy(), atol=1e-5)


def check_tables(trace: Trace, snapshots: Snapshots) -> None:
    """Block tables rebuilt from the trace are the manager's at every step and release."""
    known = names(trace)

    def found(**when: int) -> dict[tuple[str, int], list[int]]:
        tables = block_tables(trace, **when)
        return {(known[request], group): blocks for (request, group), blocks in tables.items()}

    assert snapshots.releases
    assert len(snapshots.steps) == trace.table("steps").num_rows
    for number, (_, expected) in enumerate(snapshots.steps):
        assert found(step=number) == expected
    for at_ns, expected in snapshots.releases:
        assert found(at_ns=at_ns) == expected


@pytest.mark.parametrize(
    ("family", "kernel"),
    [("Llama", "sdpa"), ("Llama", "eager"), ("Qwen3", "sdpa"), ("GptOss", "eager")],
)
def test_a_batch_is_recorded_as_it_ran(family: str, kernel: str, tmp_path: Path) -> None:
    model, inputs = build(family, kernel), prompts(21, 7, 30, 13)
    plain = generate(model, inputs)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = generate(model, inputs)

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.status == "complete"
    check_sequences(trace, recorded)
    check_attention(trace, model)
    assert trace.rows == sum(
        len(r.prompt_ids) + len(r.generated_tokens) - 1 for r in plain.values()
    )


def test_blocks_grow_with_a_request_and_are_freed_with_it(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, inputs = build(), prompts(9, 14)
    with record(model, tmp_path / "a.kvtrace", strict=True):
        generate(model, inputs, allow_block_sharing=False)
    trace = kvtrace.open(tmp_path / "a.kvtrace")

    check_tables(trace, snapshots)
    assert block_tables(trace) == {}
    kinds = {e["event"] for e in trace.table("kv_events").to_pylist()}
    assert kinds == {"allocate", "free"}
    # 9 + 8 and 14 + 8 tokens in pages of 4.
    assert len(events(trace, "allocate")) == len(events(trace, "free")) == 5 + 6
    block = PAGE * 2 * 2 * 2 * 12 * 4
    assert {e["bytes"] for e in events(trace, "allocate")} == {block}
    assert {e["bytes"] for e in events(trace, "free")} == {0}
    grown = [e["step"] for e in events(trace, "allocate")]
    assert grown == sorted(grown)
    assert grown.count(0) == 3 + 4


def test_a_shared_prefix_begins_with_the_rows_of_the_request_that_computed_it(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, inputs = build(), prompts(23, 19, 22, shared=18)

    def run() -> dict[str, Any]:
        config = batching(return_logprobs=True)
        with model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=config
        ) as manager:
            found = {}
            for ids in inputs:
                # One after the other: the later ones find the blocks of the first in the cache.
                name = manager.add_request(ids, eos_token_id=-1)
                found[name] = manager.get_result(name, timeout=60)
        return found

    plain = run()
    snapshots.__init__()  # type: ignore[misc]
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = run()

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    check_sequences(trace, recorded)
    check_attention(trace, model)
    check_tables(trace, snapshots)
    forks = trace.table("forks").to_pylist()
    # 18 tokens are four full pages.
    assert [(f["source"], f["tokens"]) for f in forks] == [(0, 16), (0, 16)]
    assert [e["block_index"] for e in events(trace, "share")] == [0, 1, 2, 3] * 2
    processed = trace.table("rows")["position"].to_pylist()
    assert processed.count(15) == 1
    assert processed.count(16) == 3


def test_the_keys_of_an_ended_request_are_read_back_where_another_begins_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_back = TraceWriter.read_back

    def counted(self: Any, kind: str, model: int, rows: Any) -> Any:
        read.append(len(rows))
        return read_back(self, kind, model, rows)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError("no process, so that the writer runs in this one")

    monkeypatch.setattr(pipeline, "WriterProcess", refused)
    monkeypatch.setattr(histories, "DORMANT_BYTES", 0)
    monkeypatch.setattr(TraceWriter, "read_back", counted)
    model, results = build(), {}
    with (
        record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching()
        ) as manager,
    ):
        for ids in prompts(23, 19, 22, shared=18):
            name = manager.add_request(ids, eos_token_id=-1)
            results[name] = manager.get_result(name, timeout=60)

    assert recording.gaps == {}
    assert read == [16, 16]
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    check_sequences(trace, results)
    check_attention(trace, model)


def test_what_keys_received_is_summed_over_the_parts_of_a_prompt(tmp_path: Path) -> None:
    """Prompts longer than a batch are processed in parts, which see the earlier parts' keys."""
    model, inputs = build("GptOss", "eager"), prompts(40, 21, 60)
    traces = []
    runs: dict[str, dict[str, Any]] = {"full": {}, "less": {"queries": "last=5"}}
    for name, options in runs.items():
        path = tmp_path / f"{name}.kvtrace"
        with record(model, path, dtype="float32", strict=True, **options) as recording:
            generate(model, inputs, max_batch_tokens=32)
        assert recording.gaps == {}
        traces.append(kvtrace.open(path))
    full, less = traces
    by_name = {name: number for number, name in names(less).items()}
    for number, name in names(full).items():
        (request,) = (r for r in full.requests() if r.request == number)
        part = slice(0, request.prompt_tokens)
        for spec in full.layers:
            maps = [full.attention(spec.layer, h, part, part, number) for h in range(4)]
            expected = np.stack([one.sum(axis=0) for one in maps], axis=1)
            found = less.row_array("received", spec.layer, by_name[name])[part]
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_shared_prefix_received_is_a_gap(tmp_path: Path) -> None:
    model, inputs = build(), prompts(23, 19, shared=18)
    with (
        record(model, tmp_path / "a.kvtrace", queries="last=2", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching()
        ) as manager,
    ):
        for ids in inputs:
            name = manager.add_request(ids, eos_token_id=-1)
            assert manager.get_result(name, timeout=60) is not None
    ((reason, count),) = recording.gaps.items()
    assert "were another's" in reason
    assert count == 1
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert np.isnan(trace.row_array("received", 0, 1)[16:19]).all()


def test_outputs_are_verified_from_the_trace(tmp_path: Path) -> None:
    model, inputs = build(), prompts(40, 21)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True, verify=True):
        generate(model, inputs, max_batch_tokens=32)
    found = kvtrace.open(tmp_path / "a.kvtrace").table("verifications").to_pylist()
    assert [row["layer"] for row in found] == [0, 1]
    assert all(row["rows"] > 4 and row["max_error"] < 1e-5 for row in found)


def test_the_children_of_a_request_begin_with_its_rows(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, inputs = build(), prompts(18, 11)
    plain = generate(model, inputs, children=2, seed=3)
    snapshots.__init__()  # type: ignore[misc]
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = generate(model, inputs, children=2, seed=3)

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert len(names(trace)) == 6
    check_sequences(trace, recorded)
    check_attention(trace, model)
    check_tables(trace, snapshots)
    # The pages that a parent has filled are shared, the last one is copied.
    assert len(events(trace, "fork")) == 2 * 2
    assert {e["bytes"] for e in events(trace, "fork")} == {PAGE * 2 * 2 * 2 * 12 * 4}


@pytest.fixture
def swap_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap pool without pinned memory, which a machine without an accelerator has not."""

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.empty(*args, **kwargs)

    unpinned = SimpleNamespace(**{**vars(torch), "empty": empty})
    monkeypatch.setattr(offloading_manager, "torch", unpinned)


def pressed(model: Any, **options: Any) -> dict[str, Any]:
    """Requests that together need more blocks than there are."""
    # A cache that slides needs fewer.
    blocks = 20 if model.config.model_type == "llama" else 13
    return generate(model, prompts(18, 15, 17, 16), new=14, num_blocks=blocks, **options)


@pytest.mark.parametrize(("family", "kernel"), [("Llama", "sdpa"), ("GptOss", "eager")])
def test_under_pressure_a_soft_reset_is_a_crop_to_nothing(
    family: str, kernel: str, snapshots: Snapshots, tmp_path: Path
) -> None:
    model = build(family, kernel)
    plain = pressed(model)
    snapshots.__init__()  # type: ignore[misc]
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = pressed(model)

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    resets = [e["request"] for e in events(trace, "reset")]
    assert resets
    crops = [f for f in trace.table("forks").to_pylist() if f["request"] == f["source"]]
    assert {f["request"] for f in crops} == set(resets)
    check_sequences(trace, recorded)
    check_attention(trace, model)
    check_tables(trace, snapshots)


@pytest.mark.usefixtures("swap_space")
def test_offloaded_requests_are_restored_and_go_on(snapshots: Snapshots, tmp_path: Path) -> None:
    model = build()
    plain = pressed(model, cpu_offload_space=0.01)
    snapshots.__init__()  # type: ignore[misc]
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = pressed(model, cpu_offload_space=0.01)

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    offloaded = events(trace, "offload")
    assert offloaded
    assert {e["device"] for e in offloaded} == {"cpu swap"}
    key = [(e["request"], e["block_index"]) for e in offloaded]
    assert key == [(e["request"], e["block_index"]) for e in events(trace, "restore")]
    left = [e for e in events(trace, "free") if e["device"] == "cpu swap"]
    assert [e["block"] for e in left] == [e["block"] for e in offloaded]
    check_sequences(trace, recorded)
    check_attention(trace, model)
    check_tables(trace, snapshots)


def test_cached_blocks_are_evicted_when_others_need_them(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, inputs = build(), prompts(21, 22, 23)
    with (
        record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching(num_blocks=9)
        ) as manager,
    ):
        results = {}
        for ids in inputs:
            name = manager.add_request(ids, eos_token_id=-1)
            results[name] = manager.get_result(name, timeout=60)

    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    check_sequences(trace, results)
    check_tables(trace, snapshots)
    evicted = events(trace, "evict")
    assert evicted
    assert {e["bytes"] for e in evicted} == {0}
    # What is evicted is what had been kept when its request was freed.
    kept = [e["block"] for e in events(trace, "free") if e["bytes"]]
    assert [e["block"] for e in evicted] == kept[: len(evicted)]


def test_a_cancelled_request_gives_its_blocks_back(snapshots: Snapshots, tmp_path: Path) -> None:
    model, inputs = build(), prompts(21, 9)
    with (
        record(None, tmp_path / "a.kvtrace", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(200),
            continuous_batching_config=batching(allow_block_sharing=False, num_blocks=128),
        ) as manager,
    ):
        manager.add_request(inputs[0], request_id="left", streaming=True, eos_token_id=-1)
        manager.add_request(inputs[1], request_id="stays", max_new_tokens=60, eos_token_id=-1)
        assert manager.get_result("left", timeout=60) is not None
        manager.cancel_request("left")
        while (result := manager.get_result("stays", timeout=60)) is None:
            pass

    assert len(result.generated_tokens) == 60
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert set(names(trace).values()) == {"left", "stays"}
    check_tables(trace, snapshots)
    assert block_tables(trace) == {}
    by_name = {name: trace.tokens(number).num_rows for number, name in names(trace).items()}
    assert by_name["stays"] == 9 + 59
    assert 21 < by_name["left"] < 21 + 199


def test_a_model_that_is_not_asked_for_leaves_no_trace(tmp_path: Path) -> None:
    model, other = build(), build("Qwen3")
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        generate(other, prompts(9))
        generate(model, prompts(9))
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.table("models")["architecture"].to_pylist() == ["LlamaForCausalLM"]
    assert {e["request"] for e in events(trace, "allocate")} == {
        r.request for r in trace.requests()
    }


def test_what_was_computed_before_the_recording_is_not_made_up(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, (first, second, other) = build(), prompts(23, 19, 14, shared=9)
    other = other[::-1]
    with model.continuous_batching_context_manager(
        generation_config=sampling(), continuous_batching_config=batching()
    ) as manager:
        manager.add_request(first, request_id="before", eos_token_id=-1)
        assert manager.get_result("before", timeout=60) is not None
        snapshots.__init__()  # type: ignore[misc]
        with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
            results = {}
            for name, ids in (("late", second), ("other", other)):
                manager.add_request(ids, request_id=name, eos_token_id=-1)
                results[name] = manager.get_result(name, timeout=60)

    ((reason, count),) = recording.gaps.items()
    assert "before the recording began" in reason
    # Two pages of its prompt were in the cache; the rest was processed and cannot be told.
    assert count == 19 + 8 - 8
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    check_sequences(trace, {"other": results["other"]})
    assert set(names(trace).values()) == {"late", "other"}
    check_attention(trace, model)


def test_a_step_that_was_dropped_takes_what_builds_on_it_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(), prompts(23, 19, 22, shared=9)
    inputs[2] = inputs[2][::-1]
    refused: list[int] = []
    reserve = Pipeline.reserve

    def once(self: Any, *args: Any) -> Any:
        refused.append(1)
        return None if len(refused) == 1 else reserve(self, *args)

    monkeypatch.setattr(Pipeline, "reserve", once)
    results = {}
    with (
        record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching()
        ) as manager,
    ):
        for ids in inputs:
            name = manager.add_request(ids, eos_token_id=-1)
            results[name] = manager.get_result(name, timeout=60)

    # All of the first, and what the second did not take from it.
    assert sum(recording.gaps.values()) == 23 + 8 + 19 + 8 - 8
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.table("forks").num_rows == 0
    check_sequences(trace, {"req_2": results["req_2"]})
    check_attention(trace, model)


def test_two_managers_at_once_keep_their_requests_apart(tmp_path: Path) -> None:
    models = [build(), build("Qwen3")]
    inputs = [prompts(21, 7, 30), prompts(12, 26)]
    with (
        record(None, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording,
        ThreadPoolExecutor(2) as pool,
    ):
        results = list(pool.map(generate, models, inputs))

    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    architectures = trace.table("models")["architecture"].to_pylist()
    rows = trace.table("requests").to_pylist()
    for model, found in zip(models, results, strict=True):
        number = architectures.index(type(model).__name__)
        own = {row["external_id"]: row["request"] for row in rows if row["model"] == number}
        assert set(own) == set(found)
        model.set_attn_implementation("eager")
        for name, result in found.items():
            tokens = trace.tokens(own[name])["token_id"].to_pylist()
            assert tokens == (result.prompt_ids + result.generated_tokens)[:-1]
            with torch.no_grad():
                expected = model(torch.tensor([tokens]), output_attentions=True).attentions
            attention = trace.attention(1, 3, request=own[name])
            np.testing.assert_allclose(attention, expected[1][0, 3].numpy(), atol=1e-5)


def test_a_tap_that_fails_in_the_managers_thread_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs = build(), prompts(21, 7)
    plain = generate(model, inputs)
    noted = PagedCacheState.block

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        if args[4] == "free":
            raise RuntimeError("boom")
        noted(self, *args, **kwargs)

    monkeypatch.setattr(PagedCacheState, "block", failing)
    with record(model, tmp_path / "a.kvtrace", dtype="float32") as recording:
        recorded = generate(model, inputs)
    assert answers(recorded) == answers(plain)
    assert capsys.readouterr().err.count("kvtrace: the paged cache tap failed") == 1
    assert len(recording.gaps) == 1
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    # The steps before the failure are whole.
    check_sequences(trace, recorded)
    check_attention(trace, model)


def test_batches_that_run_no_python_are_gaps(
    snapshots: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(), prompts(21, 7)
    plain = generate(model, inputs)
    snapshots.__init__()  # type: ignore[misc]
    with record(model, tmp_path / "a.kvtrace") as recording, monkeypatch.context() as replaying:
        # As a CUDA graph that is replayed: the model is not called.
        replaying.setattr(PreTrainedModel, "__call__", torch.nn.Module.__call__)
        recorded = generate(model, inputs)
    assert answers(recorded) == answers(plain)
    ((reason, count),) = recording.gaps.items()
    assert "use_cuda_graph=False" in reason
    assert count == 21 + 8 + 7 + 8
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.rows == 0
    # Who ran, when, in which batch and in which blocks is known all the same.
    assert sorted(names(trace).values()) == ["req_0", "req_1"]
    assert trace.table("steps")["num_tokens"].to_pylist() == [28, *[2] * 8]
    check_tables(trace, snapshots)


def test_another_versions_batching_is_a_gap_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(), prompts(21, 7)
    plain = generate(model, inputs)
    monkeypatch.delattr(offloading_manager.OffloadingManager, "free_request_cpu_cache")
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        recorded = generate(model, inputs)
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert answers(recorded) == answers(plain)
    (reason,) = recording.gaps
    assert "OffloadingManager.free_request_cpu_cache" in reason
    assert kvtrace.open(tmp_path / "a.kvtrace").rows == 6
