"""Sinks and heavy hitters: the page, the replay and the definition name the same keys."""

from __future__ import annotations

import numpy as np

from kvtrace.head_map import HeadMap
from kvtrace.marks import find_marks
from kvtrace.testing import SyntheticTrace
from kvtrace.writer import LayerSpec
from kvtrace_viewer.replay import replay


def test_marks_are_the_definitions(synthetic_trace: SyntheticTrace) -> None:
    # A scale of 1.5 makes random attention peaked enough to have sinks: synthetic.
    specs = [LayerSpec(layer, 4, 2, 16, 16, 1.5) for layer in range(2)]
    trace = synthetic_trace(steps=[250, 20], specs=specs)
    total = trace.rows
    expected_sinks = 0
    rows = np.arange(total)
    for layer in range(2):
        data = trace.layer_data(layer)
        for head in range(4):
            weights = trace.attention(layer, head).astype(np.float64)
            far = [weights[j + 65 :, j].mean() if j + 65 < total else 0.0 for j in rows]
            uniform = [(1 / (rows[j:] + 1)).sum() for j in rows]
            sinks = {j for j in rows if far[j] >= 0.1}
            heavy = {j for j in rows if weights[:, j].sum() >= 5 * uniform[j]} - sinks
            marks = find_marks(HeadMap(data, head))
            assert {m.position for m in marks if m.kind == "sink"} == sinks
            assert {m.position for m in marks if m.kind == "heavy"} == heavy
            expected_sinks += len(sinks)
    assert expected_sinks > 0
    (full,) = replay(trace, ["full"], ["100%"], when="step", store=False)
    assert (full.sinks, full.retained_sinks) == (expected_sinks, expected_sinks)
