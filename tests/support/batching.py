"""Continuous batching of tiny random models, and what the manager itself knew of it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
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
from transformers.generation.continuous_batching.scheduler import Scheduler

from kvtrace import Trace
from kvtrace.block_tables import block_tables

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


PATCHED: dict[type, tuple[str, ...]] = {
    ContinuousBatchProcessor: ("_generation_step", "update_batch", "prepare_next_batch"),
    PagedAttentionCache: ("update", "evict_cached_blocks", "reset"),
    CacheAllocator: ("fork_blocks", "free_blocks", "mark_complete_blocks"),
    FullAttentionCacheAllocator: ("allocate_cache_to_request",),
    SlidingAttentionCacheAllocator: ("allocate_cache_to_request",),
    Scheduler: ("add_waiting_request",),
    offloading_manager.OffloadingManager: ("_offload_to_cpu", "restore_scheduled_requests"),
}


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

    def clear(self) -> None:
        """Forget what was seen: the run that follows is the recorded one."""
        self.steps.clear()
        self.releases.clear()


def tables_of(cache: Any) -> Snapshot:
    tables = {
        (name, allocator.index): list(blocks)
        for allocator in cache.cache_allocators.values()
        for name, blocks in allocator.block_table.items()
        if blocks
    }
    return time.time_ns(), tables


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
