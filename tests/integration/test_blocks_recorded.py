"""The block stream of a real continuous-batching run, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.batching import PAGE, batching, build, events, prompts, sampling

import kvtrace
from kvtrace_recorder import record
from kvtrace_viewer.blocks import Accounting, read_stream, replay_blocks

pytestmark = pytest.mark.usefixtures("one_thread", "batching_restored", "writer_thread")


def test_what_the_manager_shared_is_what_its_blocks_hit(tmp_path: Path) -> None:
    model, inputs = build(), prompts(23, 19, 22, shared=18)
    with (
        record(model, tmp_path / "a.kvtrace", strict=True),
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching()
        ) as manager,
    ):
        for ids in inputs:
            # One after the other: the later ones find the blocks of the first in the cache.
            manager.get_result(manager.add_request(ids, eos_token_id=-1), timeout=200)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    stream = read_stream(trace)
    assert stream.block_size == PAGE
    assert stream.prompt_tokens.tolist() == [23, 19, 22]
    # One after the other: each has ended when the next begins.
    assert (stream.end_ns > stream.arrival_ns).all()
    assert (stream.end_ns[:-1] <= stream.arrival_ns[1:]).all()
    (held,) = replay_blocks(stream, ["lru"], [64], hold="service")
    assert held.held is not None
    assert held.held.most == max(len(part) for part in np.split(stream.blocks, stream.starts[1:-1]))
    shared = [e["block_index"] for e in events(trace, "share")]
    # 18 common tokens are four full pages.
    assert shared == [0, 1, 2, 3] * 2
    (found,) = replay_blocks(stream, ["vllm"], [64])
    assert found.hits == len(shared)
    first, second, _ = np.split(stream.blocks, stream.starts[1:-1])
    assert first[:4].tolist() == second[:4].tolist() == [0, 1, 2, 3]
    assert not set(first[4:]) & set(second[4:])
    # Twice the page: two full blocks of the eighteen tokens are common, whole.
    larger = read_stream(trace, 2 * PAGE)
    (found,) = replay_blocks(larger, ["lru"], [64], Accounting(blocks="full"))
    assert found.hits == 2 * 2
