from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrace import arrays
from kvtrace.errors import TraceError
from kvtrace.store import StoreReader, StoreWriter, publish


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few rows, so that a short test crosses many of them."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 64)
    monkeypatch.setattr(arrays, "CHUNKS_PER_SHARD", 4)
    monkeypatch.setattr(arrays, "TAIL_BYTES", 256)


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.integers(0, 90), min_size=1, max_size=8),
    dtype=st.sampled_from(["float16", "float32", "int32"]),
    lanes=st.integers(1, 3),
    every=st.integers(1, 3),
)
def test_what_was_appended_is_read_back_live_and_closed(
    pieces: list[int], dtype: str, lanes: int, every: int
) -> None:
    total = sum(pieces)
    values = np.arange(total * lanes * 2).reshape(total, lanes, 2).astype(dtype)
    with TemporaryDirectory() as folder:
        writer = StoreWriter(Path(folder) / "s")
        writer.declare_array("x", tail=(lanes, 2), dtype=dtype, axes="row,layer,d")
        writer.commit()
        live = StoreReader(Path(folder) / "s").array("x")
        done = committed = 0
        for number, piece in enumerate(pieces):
            writer.append_rows("x", values[done : done + piece])
            done += piece
            if number % every == 0:
                writer.commit()
                committed = done
            np.testing.assert_array_equal(live.read(0, committed), values[:committed])
        writer.close()
        for lane in range(lanes):
            np.testing.assert_array_equal(live.read(0, done, lane), values[:, lane])
        fresh = StoreReader(Path(folder) / "s")
        assert (fresh.rows, fresh.complete) == (total, True)
        assert fresh.array("x").shape == values.shape
        assert not (Path(folder) / "s/arrays.zarr/x.tail").exists()


def test_rows_not_committed_are_not_there(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.declare_array("x", tail=(1, 2), dtype="float32", axes="row,layer,d")
    writer.append_rows("x", np.ones((5, 1, 2), np.float32))
    writer.commit()
    writer.append_rows("x", np.ones((5, 1, 2), np.float32))
    reader = StoreReader(tmp_path / "s")
    assert reader.rows == 5
    with pytest.raises(IndexError):
        reader.array("x").read(0, 6)
    writer.close()


def test_lanes_that_disagree_cannot_be_committed(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.declare_array("x", tail=(2, 2), dtype="float32", axes="row,layer,d")
    writer.append_lane("x", 0, np.ones((5, 2), np.float32))
    for end in (writer.commit, writer.close):
        with pytest.raises(ValueError, match="different numbers of rows"):
            end()


def test_full_shards_are_never_rewritten_and_their_tail_chunks_go(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.declare_array("x", tail=(1, 2), dtype="float32", axes="row,layer,d")
    written: dict[Path, tuple[int, int]] = {}
    for _ in range(40):
        writer.append_rows("x", np.ones((7, 1, 2), np.float32))
        writer.commit()
        for shard in (tmp_path / "s/arrays.zarr/x").glob("c.*"):
            stat = shard.stat()
            assert written.setdefault(shard, (stat.st_ino, stat.st_mtime_ns)) == (
                stat.st_ino,
                stat.st_mtime_ns,
            )
    assert len(written) == 280 // 32
    tail = (tmp_path / "s/arrays.zarr/x.tail").glob("c.*")
    assert min(int(chunk.name.split(".")[1]) for chunk in tail) * 32 >= len(written) * 32
    writer.close()


def test_tables_come_back_with_missing_columns_null(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.append("tokens", {"request": [0, 0], "position": [0, 1], "text": ["a", "\ud7ff €"]})
    writer.commit()
    writer.append("tokens", {"request": [1], "position": [0]})
    writer.close()
    found = StoreReader(tmp_path / "s").table("tokens").to_pylist()
    assert [row["text"] for row in found] == ["a", "\ud7ff €", None]
    assert [row["token_id"] for row in found] == [None] * 3


def test_an_unknown_column_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    with pytest.raises(KeyError, match="nonsense"):
        writer.append("tokens", {"nonsense": [1]})
    writer.close()


def test_a_damaged_segment_is_named(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.append("tokens", {"request": [0]})
    writer.close()
    (path,) = StoreReader(tmp_path / "s").segments("tokens")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(TraceError, match=path.name):
        StoreReader(tmp_path / "s").table("tokens")


def test_publish_replaces_what_was_there(tmp_path: Path) -> None:
    for name, content in (("a", "old"), (".a.tmp", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    publish(tmp_path / ".a.tmp", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a/file").read_text() == "new"
