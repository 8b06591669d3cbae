"""`kvtrace check --repair`: what is derived is built again, one wrong bit is put right, the rest
is put aside, and what is read afterwards is right or is not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace import arrays, checksums
from kvtrace.check import check, repair
from kvtrace.check.report import Status
from kvtrace.cli import main

from .test_trace_damage import make_trace


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A closed and a cut-off trace with shards of a few rows."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 256)
        patch.setattr(arrays, "CHUNKS_PER_SHARD", 2)
        patch.setattr(arrays, "TAIL_BYTES", 512)
        for name in ("closed", "cut"):
            make_trace(folder / f"{name}.kvtrace", closed=name == "closed")
            # A database of the trace as it is, for the tests of what is built again.
            kvtrace.open(folder / f"{name}.kvtrace").sql("select 1")
        yield {name: folder / f"{name}.kvtrace" for name in ("closed", "cut")}


def values(path: Path) -> dict[str, Any]:
    trace = kvtrace.open(path)
    found: dict[str, Any] = {"tokens": trace.tokens()["token_id"].to_pylist()}
    for layer in range(2):
        data = trace.layer_data(layer)
        found |= {f"{kind}{layer}": getattr(data, kind) for kind in ("q", "k", "v", "lse")}
    return found


def spoil(path: Path, pattern: str) -> Path:
    """Overwrite twenty bytes in the middle of the last file of that name."""
    file = sorted(path.glob(pattern))[-1]
    data = bytearray(file.read_bytes())
    at = len(data) // 2
    data[at : at + 20] = bytes(255 - byte for byte in data[at : at + 20])
    file.write_bytes(data)
    checksums._sum_of.cache_clear()
    return file


@pytest.mark.parametrize(
    ("which", "pattern", "rows", "lost"),
    [
        ("closed", "rank-00000/arrays.zarr/k/c.1.0.0.0", 42, {"k0"}),
        ("closed", "rank-00000/tables/gaps/*.parquet", 42, set()),
        # The last commit of tokens is gone, and of a damaged journal what the line said.
        ("closed", "rank-00000/tables/tokens/*.parquet", 41, set()),
        ("closed", "rank-00000/journal", 40, set()),
        ("closed", "rank-00000/arrays.zarr/v/zarr.json", 42, {"v0", "v1"}),
        ("closed", "replays/r1/arrays.zarr/evicted_at/c.0.0.0", 42, set()),
        ("cut", "rank-00000/arrays.zarr/q.tail/c.*.0.0.0", 42, {"q0", "q1"}),
        ("cut", "rank-00000/arrays.zarr/q/c.0.1.0.0", 42, {"q1"}),
    ],
)
def test_what_is_damaged_is_put_aside_and_nothing_else(
    made: dict[str, Path], tmp_path: Path, which: str, pattern: str, rows: int, lost: set[str]
) -> None:
    path = tmp_path / "x.kvtrace"
    shutil.copytree(made[which], path)
    want = values(path)
    file = spoil(path, pattern)
    damaged = file.read_bytes()
    report = check(path)
    assert report.status is Status.DAMAGED
    assert report.problems[0].lost
    done = repair(path, report)
    assert done
    assert check(path).status in (Status.WHOLE, Status.CUT_OFF)
    (kept,) = path.glob(f"quarantine/*/{file.relative_to(path)}")
    assert kept.read_bytes() == damaged
    trace = kvtrace.open(path)
    assert trace.rows == rows
    found = values(path)
    for name, value in want.items():
        if value is None or isinstance(value, list):
            assert found[name] == (value and value[:rows])
        elif found[name] is None:
            assert name in lost
        else:
            held = ~np.isnan(found[name].reshape(rows, -1)).any(axis=1)
            assert held.all() == (name not in lost)
            np.testing.assert_array_equal(found[name][held], value[:rows][held])
    if not pattern.startswith("replays"):
        gaps = [gap["reason"] for gap in trace.table("gaps").to_pylist()]
        assert any("quarantine" in reason for reason in gaps)


@pytest.mark.parametrize(
    "pattern",
    [
        "rank-00000/journal",
        "rank-00000/tables/rows/*.parquet",
        "rank-00000/arrays.zarr/q/zarr.json",
    ],
)
def test_one_wrong_bit_of_a_small_file_is_put_right(
    made: dict[str, Path], tmp_path: Path, pattern: str
) -> None:
    path = tmp_path / "x.kvtrace"
    shutil.copytree(made["closed"], path)
    (file,) = sorted(path.glob(pattern))[:1]
    whole = file.read_bytes()
    wrong = bytearray(whole)
    wrong[len(wrong) // 3] ^= 4
    file.write_bytes(wrong)
    checksums._sum_of.cache_clear()
    assert "one wrong bit" in repair(path, check(path))[0]
    assert file.read_bytes() == whole
    assert check(path).status is Status.WHOLE


@pytest.mark.parametrize("name", ["trace.duckdb", "manifest.json"])
def test_what_is_derived_is_built_again(
    made: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.kvtrace"
    shutil.copytree(made["closed"], path)
    want = values(path)
    spoil(path, name)
    assert main(["check", str(path)]) == 4
    assert name in capsys.readouterr().out
    assert main(["check", "--repair", str(path)]) == 0
    assert f"{name} was" in capsys.readouterr().out
    assert values(path)["tokens"] == want["tokens"]


def test_a_trace_without_a_manifest_or_a_rank_is_no_trace(tmp_path: Path) -> None:
    assert main(["check", str(tmp_path)]) == 1
