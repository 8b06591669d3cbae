"""Recorded traces carry the output projections, so that policies that weigh values can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.tiny import SHARP, greedy, llama

import kvtrace
from kvtrace_recorder import record
from kvtrace_recorder.session.projections import output_projections
from kvtrace_viewer.replay import replay, replayable

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


@pytest.mark.writer_process
def test_policies_that_need_them_are_replayed(tmp_path: Path) -> None:
    model: Any = llama(**SHARP)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True):
        greedy(model)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    kept = trace.static("wo")
    for number, layer in enumerate(model.model.layers):
        np.testing.assert_array_equal(kept[number], layer.self_attn.o_proj.weight.detach())
    rows = {row["policy"]: row["replay"] for row in replayable(trace)}
    assert rows["criticalkv"] == rows["defensivekv"] == "exactly"
    for policy in ("criticalkv:window=2", "defensivekv:window=2"):
        (found,) = replay(trace, [policy], ["50%"])
        assert found.evictions > 0


@pytest.mark.parametrize(
    "options", [{"detail": "events"}, {"detail": "qk"}, {"max_bytes": 250_000}], ids=str
)
def test_they_are_left_out_with_the_values_and_where_they_would_be_much(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model: Any = llama(**SHARP)
    with record(model, tmp_path / "a.kvtrace", strict=True, **options):
        greedy(model)
    assert "wo" not in kvtrace.open(tmp_path / "a.kvtrace").signals


def test_models_without_one_plain_matrix_a_layer() -> None:
    model: Any = llama(**SHARP)
    found = output_projections(model, "float16")
    assert found is not None
    assert found.shape == (2, 32, 32)
    assert found.dtype == np.float16
    assert output_projections(model, "float16", most_bytes=4095) is None
    assert output_projections(model.train(), "float16") is None
    del model.eval().model.layers[1].self_attn.o_proj
    assert output_projections(model, "float16") is None
