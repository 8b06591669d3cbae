"""Cuts after each chunk of a prompt: the recorded ones, or of a given size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny import SHARP, llama

import kvtrace
from kvtrace import Trace
from kvtrace_recorder import record
from kvtrace_viewer.replay import replay

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")
POLICIES = ["streaming_llm:sinks=2", "h2o", "knorm", "snapkv:window=4", "oracle"]
PROMPT, TOKENS = 36, 44


@pytest.fixture
def chunked(tmp_path: Path) -> Trace:
    """A real run whose prompt was prefilled in three chunks: 12, 12, 12."""
    model: Any = llama(**SHARP)
    torch.manual_seed(4)
    ids = torch.randint(3, 60, (1, PROMPT))
    with torch.no_grad(), record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True):
        model.generate(
            ids,
            max_new_tokens=TOKENS - PROMPT + 1,
            do_sample=False,
            eos_token_id=None,
            prefill_chunk_size=12,
        )
    return kvtrace.open(tmp_path / "a.kvtrace")


def test_recorded_chunks_are_those_of_their_size(chunked: Trace) -> None:
    assert [r.prompt_tokens for r in chunked.requests()] == [PROMPT]
    own = replay(chunked, POLICIES, ["25%"], "chunk")
    sized = replay(chunked, POLICIES, ["25%"], "chunk=12", store=False)
    other = replay(chunked, POLICIES, ["25%"], "chunk=9", store=False)
    for a, b, c in zip(own, sized, other, strict=True):
        np.testing.assert_array_equal(a.evicted_at, b.evicted_at)
        assert (a.evicted_at != c.evicted_at).any()
        assert a.retained_mass == b.retained_mass
        assert a.measured_rows == TOKENS - 12
        assert set(np.unique(a.evicted_at)) == {-1, 11, 23, 35}
        assert a.exactness == ("E0" if a.policy.startswith("streaming") else "E2")
        # Nothing is cut while decoding: the budget is that of the prompt's end.
        assert {len(x) for x in a.kept()[0].values()} == {9}
    assert {row["decide_when"] for row in chunked.replays().to_pylist()} == {"chunk"}
