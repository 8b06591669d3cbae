"""Traces of every released version go on opening, and give the numbers they gave then."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.golden import make

import kvtrace
from kvtrace.check import check
from kvtrace.check.report import Status
from kvtrace.layout import FORMAT_VERSION

GOLDEN = sorted(make.HERE.glob("*.kvtrace"))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_trace_gives_the_same_numbers(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / golden.name
    shutil.copytree(golden, path)
    with np.load(golden.with_suffix(".npz")) as want:
        found = make.numbers(kvtrace.open(path))
        assert sorted(found) == sorted(want)
        for name, value in found.items():
            if name.startswith("attention"):
                # Another BLAS sums in another order.
                np.testing.assert_allclose(value, want[name], atol=1e-6)
            else:
                np.testing.assert_array_equal(value, want[name])
    assert check(path).status is Status.WHOLE


def test_this_format_has_a_golden_trace() -> None:
    assert any(path.stem.endswith(f"-format-{FORMAT_VERSION}") for path in GOLDEN)


def test_golden_traces_are_small() -> None:
    for path in GOLDEN:
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 200_000
