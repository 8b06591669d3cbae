"""What the oracle remembers of the future where it cannot remember all, on synthetic heads."""

from __future__ import annotations

import numpy as np
import pytest
from tests.reference.heads import synthetic_head

from kvtrace_viewer.replay import parse_budget, parse_policy, parse_when
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer, workers
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.policies import oracle

TOKENS, PROMPT = 520, 70


def replayed(when: str) -> HeadReplay:
    budgets = [parse_budget(text) for text in ("3%", "20%", "60%")]
    heads = [synthetic_head(7, TOKENS, PROMPT, 2)]
    with workers(1) as pool:
        runs = [Run(parse_policy("oracle"), parse_when(when), budgets)]
        return replay_layer(heads, runs, Measures(), pool, lambda count: None)[0]


@pytest.mark.parametrize("when", ["step", "every=100", "prefill"])
def test_what_is_not_remembered_is_found_again(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = replayed(when)
    remembered = 16 * 8 * TOKENS * TOKENS // 64
    for part in (3, 1000):  # every third block's values, the last block's alone
        monkeypatch.setattr(oracle, "SNAPSHOT_BYTES", remembered // part)
        got = replayed(when)
        assert got.runs[0].state.apart >= min(part, 3) or when == "prefill"
        np.testing.assert_array_equal(got.evicted_at, want.evicted_at)
        np.testing.assert_array_equal(got.runs[0].bound(), want.runs[0].bound())
