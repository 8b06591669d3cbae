"""What the chunk encoder writes is what zarr itself would have written, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrace import arrays
from kvtrace.arrays import CHUNK_KEYS, fill_value
from kvtrace.chunks import COMPRESSORS, TAIL_COMPRESSORS, ChunkEncoder
from kvtrace.errors import TraceError
from kvtrace.store import StoreReader, StoreWriter

TYPES = ["float16", "float32", "int32"]


@settings(max_examples=15, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    held=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_a_shard_is_zarrs_own(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, held: list[bool], seed: int
) -> None:
    path = tmp_path_factory.mktemp("shard")
    rng = np.random.default_rng(seed)
    values = np.full((4, 16, 2, 8), fill_value(np.dtype(dtype)), dtype)
    # Few values, so that some chunks become smaller.
    values[held] = rng.integers(0, 3, values.shape)[held].astype(dtype)
    array = zarr.create_array(
        path,
        shape=(64, 2, 8),
        shards=(64, 2, 8),
        chunks=(16, 2, 8),
        dtype=dtype,
        fill_value=fill_value(np.dtype(dtype)),
        compressors=COMPRESSORS,
        chunk_key_encoding=CHUNK_KEYS,
    )
    array[:] = values.reshape(64, 2, 8)
    found = ChunkEncoder(np.dtype(dtype)).shard(
        [chunk if wanted else None for chunk, wanted in zip(values, held, strict=True)]
    )
    file = path / "c.0.0.0"
    # Of a shard without a chunk there is no file; the writer asks for none.
    assert file.read_bytes() == b"".join(found) if any(held) else not file.exists()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_tail_chunk_is_zarrs_own(tmp_path: Path, dtype: str) -> None:
    values = np.arange(96).reshape(8, 3, 4).astype(dtype)
    array = zarr.create_array(
        tmp_path / "x",
        shape=values.shape,
        chunks=values.shape,
        dtype=dtype,
        compressors=TAIL_COMPRESSORS,
        chunk_key_encoding=CHUNK_KEYS,
    )
    array[:] = values
    found = ChunkEncoder(np.dtype(dtype), tail=True).chunk(values)
    assert (tmp_path / "x/c.0.0.0").read_bytes() == b"".join(found)


def test_rows_that_nobody_wrote_take_no_room_and_read_as_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 64)
    monkeypatch.setattr(arrays, "CHUNKS_PER_SHARD", 4)
    monkeypatch.setattr(arrays, "TAIL_BYTES", 256)
    writer = StoreWriter(tmp_path / "s")
    writer.declare_array("x", tail=(2, 2), dtype="float32", axes="row,layer,d")
    writer.pad("x", 0, 100)
    writer.pad("x", 1, 70)
    writer.append_lane("x", 1, np.ones((30, 2), np.float32))
    writer.commit()
    folder = tmp_path / "s/arrays.zarr/x"
    # Rows 70 to 95 of lane 1 fill the last of three shards of 32 rows.
    assert {file.name for file in folder.glob("c.*")} == {"c.2.1.0"}
    writer.close()
    assert {file.name for file in folder.glob("c.*")} == {"c.2.1.0", "c.3.1.0"}
    found = np.asarray(zarr.open_array(folder, mode="r")[:])
    assert np.isnan(found[:, 0]).all()
    assert np.isnan(found[:70, 1]).all()
    assert (found[70:, 1] == 1).all()


@pytest.mark.parametrize("name", ["x", "x.tail"])
def test_reading_a_damaged_chunk_names_its_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 64)
    monkeypatch.setattr(arrays, "CHUNKS_PER_SHARD", 4)
    writer = StoreWriter(tmp_path / "s")
    writer.declare_array("x", tail=(1, 2), dtype="float32", axes="row,layer,d")
    writer.append_rows("x", np.arange(80, dtype="f4").reshape(40, 1, 2))
    writer.commit()
    (chunk,) = (tmp_path / "s/arrays.zarr" / name).glob("c.*")
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(TraceError, match=rf"arrays.zarr/{name} is damaged \(rows "):
        StoreReader(tmp_path / "s").array("x").read(0, 40)
    writer.close()
