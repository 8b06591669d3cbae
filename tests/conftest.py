"""Fixtures that several areas share."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvtrace
from kvtrace import Trace
from kvtrace.testing import SyntheticTrace, write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter


@pytest.fixture
def synthetic_trace(tmp_path: Path) -> SyntheticTrace:
    """Make a closed synthetic trace: `synthetic_trace(steps=[40, 1, 1], specs=..., dtype=...)`."""

    def make(
        steps: list[int] | None = None,
        specs: list[LayerSpec] | None = None,
        name: str = "synthetic",
        dtype: str = "float32",
    ) -> Trace:
        specs = specs or [LayerSpec(layer, 4, 2, 16, 16, 0.25) for layer in range(2)]
        path = tmp_path / f"{name}.kvtrace"
        with TraceWriter(path, source="synthetic", dtype=dtype) as writer:
            write_synthetic(writer, specs, steps or [40, 1, 1, 1])
        return kvtrace.open(path)

    return make
