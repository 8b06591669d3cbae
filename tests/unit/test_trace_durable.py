"""What reaches the disk, and in which order, where a commit is to outlive a power cut."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import kvtrace
from kvtrace import arrays
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter

SPECS = [LayerSpec(layer, 2, 1, 8, 8, 0.5) for layer in range(2)]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int]]:
    """What was synchronised, in order: the path, and the journal's length at that moment."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 256)
    monkeypatch.setattr(arrays, "CHUNKS_PER_SHARD", 2)
    calls: list[tuple[Path, int]] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        journal = next((p / "journal" for p in path.parents if p.name == "rank-00000"), None)
        length = journal.stat().st_size if journal is not None and journal.exists() else 0
        calls.append((path, length))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    return calls


def write(path: Path, **options: Any) -> Path:
    with TraceWriter(path, source="synthetic", **options) as writer:
        write_synthetic(writer, SPECS, [40, 1, 1])
    return path / "rank-00000"


def test_chunks_then_segments_then_folders_then_the_journal(
    synced: list[tuple[Path, int]], tmp_path: Path
) -> None:
    rank = write(tmp_path / "x.kvtrace", durable=True)
    journal = rank / "journal"
    commits = [at for at, (path, _) in enumerate(synced) if path == journal]
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(commits) == len(lines) > 3
    length = before = 0
    for commit, line in zip(commits, lines, strict=True):
        earlier = [path for path, _ in synced[:commit]]
        # Nothing of the line was written before everything that it lists was on the disk.
        assert {size for path, size in synced[before:commit] if rank in path.parents} <= {length}
        for name in json.loads(line[9:]).get("files", {}):
            # A file is synchronised under the name it has before it takes its place.
            file = rank / name
            at = max(i for i, p in enumerate(earlier) if str(p).startswith(_aside(file)))
            assert file.parent in earlier[at:]
        kinds = [_kind(path, rank) for path, _ in synced[before:commit] if rank in path.parents]
        assert kinds == sorted(kinds, key=["chunk", "segment", "folder"].index)
        length, before = length + len(line), commit + 1
    assert {tmp_path, rank.parent, rank.parent / "manifest.json"} <= {path for path, _ in synced}


def _aside(file: Path) -> str:
    return str(file.with_name(f".{file.name}."))


def _kind(path: Path, rank: Path) -> str:
    if path.suffix != ".partial":
        return "folder"
    return "chunk" if rank / "arrays.zarr" in path.parents else "segment"


def test_nothing_is_synchronised_where_it_was_not_asked_for(
    synced: list[tuple[Path, int]], tmp_path: Path
) -> None:
    write(tmp_path / "x.kvtrace")
    assert not synced


def test_both_write_the_same(tmp_path: Path) -> None:
    for durable in (False, True):
        write(tmp_path / f"{durable}.kvtrace", durable=durable)
    one, other = (kvtrace.open(tmp_path / f"{durable}.kvtrace") for durable in (False, True))
    assert (one.attention(1, 1) == other.attention(1, 1)).all()
