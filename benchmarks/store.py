"""What storing rows costs: a trace beside raw numpy files, zarr with its defaults, and HDF5.

    python benchmarks/store.py [--mb 256] [--gb 10] [--commit ROWS] [--json FILE]

The rows are real: q, k, v and lse of a Llama of 8 layers and width 512 with random weights over a
prompt of 2048 tokens, recorded, then repeated until there are --mb of them (a chunk holds fewer
rows than were recorded, so that no compressor sees the repetition). Every store gets them in
commits of --commit rows (2048 are 34 MB; the recorder commits 64 MB or a quarter of a second), as
float16, and is read whole, and by tiles: 256 rows of q and of k of one
layer, which is what one tile of an attention map needs. MB is 10^6 bytes asked to be stored; per
core means per second of CPU of all threads. Files are in the page cache when they are read.

The open time is of a trace of --gb, of which only what is not in the arrays is read: its shards
are links to recorded ones, its journal and tables have a commit for every prompt of 2048 tokens.

HDF5 is there where h5py is (pip install h5py): it is no dependency of kvtrace.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import zarr
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import kvtrace
from kvtrace.checksums import file_sum
from kvtrace.journal import decode_line, encode_line
from kvtrace.segments import encode_segment
from kvtrace.store import StoreReader, StoreWriter
from kvtrace_recorder import record

PROMPT, TILE, TILES = 2048, 256, 60
KINDS = ("q", "k", "v", "lse")
Rows = dict[str, np.ndarray]
#: By kind: shape behind the row axis, and type.
Shapes = dict[str, tuple[tuple[int, ...], str]]


class Store(ABC):
    """One way to keep rows; `name` is what the table calls it."""

    name: str

    def __init__(self, folder: Path, shapes: Shapes, commit: int) -> None:
        self.folder, self.shapes, self.commit = folder, shapes, commit

    @abstractmethod
    def append(self, rows: Rows) -> None:
        """Store rows `[n, layer, ...]` of every kind, so that another process could read them."""

    @abstractmethod
    def close(self) -> None:
        """Finish writing and open for reading."""

    @abstractmethod
    def read(self, kind: str, start: int, stop: int, layer: int) -> np.ndarray:
        """Rows of one layer."""


class Trace(Store):
    name = "kvtrace"

    def __init__(self, folder: Path, shapes: Shapes, commit: int) -> None:
        super().__init__(folder, shapes, commit)
        self._writer = StoreWriter(folder / "s")
        for kind, (tail, dtype) in shapes.items():
            axes = "row,layer,head,d"[: None if len(tail) == 3 else -2]
            self._writer.declare_array(kind, tail=tail, dtype=dtype, axes=axes)

    def append(self, rows: Rows) -> None:
        for kind, values in rows.items():
            self._writer.append_rows(kind, values)
        self._writer.commit()

    def close(self) -> None:
        self._writer.close()
        self._reader = StoreReader(self.folder / "s")

    def read(self, kind: str, start: int, stop: int, layer: int) -> np.ndarray:
        return self._reader.array(kind).read(start, stop, layer)


class RawNumpy(Store):
    """A file a commit and kind: nothing compressed, nothing checked."""

    name = "numpy files"

    def __init__(self, folder: Path, shapes: Shapes, commit: int) -> None:
        super().__init__(folder, shapes, commit)
        folder.mkdir()
        self._commits = 0

    def append(self, rows: Rows) -> None:
        for kind, values in rows.items():
            np.save(self.folder / f"{kind}.{self._commits}.npy", values)
        self._commits += 1

    def close(self) -> None:
        pass

    def read(self, kind: str, start: int, stop: int, layer: int) -> np.ndarray:
        parts = []
        for number in range(start // self.commit, -(-stop // self.commit)):
            file = np.load(self.folder / f"{kind}.{number}.npy", mmap_mode="r")
            first = number * self.commit
            parts.append(file[max(0, start - first) : stop - first, layer])
        return np.concatenate(parts)


class PlainZarr(Store):
    """zarr as its first page shows it: default chunks, default compressor, appended to."""

    name = "zarr, defaults"

    def __init__(self, folder: Path, shapes: Shapes, commit: int) -> None:
        super().__init__(folder, shapes, commit)
        group = zarr.open_group(folder, mode="w")
        self._arrays = {
            kind: group.create_array(kind, shape=(commit, *tail), dtype=dtype)
            for kind, (tail, dtype) in shapes.items()
        }
        self._rows = 0

    def append(self, rows: Rows) -> None:
        for kind, values in rows.items():
            array = self._arrays[kind]
            array.resize((self._rows + len(values), *array.shape[1:]))
            array[self._rows :] = values
        self._rows += len(values)

    def close(self) -> None:
        pass

    def read(self, kind: str, start: int, stop: int, layer: int) -> np.ndarray:
        return np.asarray(self._arrays[kind][start:stop, layer])


class Hdf5(Store):
    """HDF5 through h5py: chunked so that it can grow, flushed at every commit."""

    name = "HDF5"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path, shapes: Shapes, commit: int) -> None:
        super().__init__(folder, shapes, commit)
        import h5py

        folder.mkdir()
        self._file = h5py.File(folder / "a.h5", "w")
        self._sets = {
            kind: self._file.create_dataset(
                kind, (0, *tail), dtype, maxshape=(None, *tail), chunks=True, **self.options
            )
            for kind, (tail, dtype) in shapes.items()
        }

    def append(self, rows: Rows) -> None:
        for kind, values in rows.items():
            data = self._sets[kind]
            data.resize(len(data) + len(values), axis=0)
            data[-len(values) :] = values
        self._file.flush()

    def close(self) -> None:
        pass

    def read(self, kind: str, start: int, stop: int, layer: int) -> np.ndarray:
        return np.asarray(self._sets[kind][start:stop, layer])


class Hdf5Gzip(Hdf5):
    name = "HDF5, gzip 1 + checksum"
    options: ClassVar = {"compression": "gzip", "compression_opts": 1, "fletcher32": True}


@dataclass
class Result:
    """One store: MB a second of CPU and of wall time, bytes per byte, milliseconds a tile."""

    store: str
    write_core: float
    write_wall: float
    read_core: float
    read_wall: float
    stored: float
    tile_ms: float
    tile_p95_ms: float


def record_prompt(folder: Path) -> Path:
    """One prompt of a Llama with random weights, recorded."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 4000, (1, PROMPT))
    path = folder / "prompt.kvtrace"
    with record(model, path, on_full="wait", progress=False, command=["bench"]), torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1)
    return path


def load_rows(path: Path) -> Rows:
    store = StoreReader(path / "rank-00000")
    return {kind: store.array(kind).read(0, store.rows) for kind in KINDS}


def measure(kind: type[Store], rows: Rows, megabytes: int, commit: int, folder: Path) -> Result:
    shapes = {name: (value.shape[1:], str(value.dtype)) for name, value in rows.items()}
    store = kind(folder / kind.__name__, shapes, commit)
    row_bytes = sum(value[0].nbytes for value in rows.values())
    count = megabytes * 10**6 // row_bytes // commit * commit
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, count, commit):
        at = start % PROMPT
        store.append({name: value[at : at + commit] for name, value in rows.items()})
    store.close()
    write = (time.process_time() - cpu, time.perf_counter() - wall)
    stored = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    layers = rows["q"].shape[1]
    wall, cpu = time.perf_counter(), time.process_time()
    for name in rows:
        for layer in range(layers):
            # A layer at a time, as a replay reads; the arrays' own length of rows at once.
            for start in range(0, count, PROMPT):
                stop = min(start + PROMPT, count)
                found = store.read(name, start, stop, layer)
            assert np.array_equal(found, rows[name][: stop - start, layer], equal_nan=True)
    read = (time.process_time() - cpu, time.perf_counter() - wall)
    tiles = read_tiles(store, count, layers)
    mb = count * row_bytes / 1e6
    return Result(
        kind.name,
        mb / write[0],
        mb / write[1],
        mb / read[0],
        mb / read[1],
        stored / (count * row_bytes),
        statistics.median(tiles),
        statistics.quantiles(tiles, n=20)[-1],
    )


def read_tiles(store: Store, count: int, layers: int) -> list[float]:
    """Milliseconds of tiles at random places."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(TILES):
        query, key = rng.integers(0, count - TILE, 2)
        layer = int(rng.integers(layers))
        started = time.perf_counter()
        store.read("q", int(query), int(query) + TILE, layer)
        store.read("k", int(key), int(key) + TILE, layer)
        found.append(1e3 * (time.perf_counter() - started))
    return found


def enlarge(prompt: Path, target: Path, gigabytes: float) -> int:
    """A trace of so many prompts that its files hold `gigabytes`; its rows.

    There are as many shards as such a trace has, each a hard link to the recorded one: only what
    is not in the arrays may be read of it. Tables are written: ids of rows, steps and requests go
    on from prompt to prompt.
    """
    shutil.copytree(prompt, target)
    (target / "trace.duckdb").unlink(missing_ok=True)
    rank = target / "rank-00000"
    lines = [decode_line(line) for line in (rank / "journal").read_bytes().splitlines(True)]
    store = StoreReader(rank)
    tables = {name: store.table(name) for name in ("requests", "steps", "rows", "tokens")}
    stored = sum(s.size for name, s in store.state.files.items() if "/c." in name)
    prompts = int(gigabytes * 1e9 / stored) + 1
    out = [line for line in lines if line is not None][:-1]
    for number in range(1, prompts):
        rows = (number + 1) * PROMPT
        files: dict[str, Any] = {}
        for kind in KINDS:
            link_shards(rank, kind, rows, files)
        segments = {}
        for table, found_rows in tables.items():
            name = f"tables/{table}/{9000000 + number}.parquet"
            (rank / name).write_bytes(encode_segment(_shifted(found_rows, number)))
            segments[table], files[name] = [name], file_sum(rank / name)
        entry = {"rows": rows, "segments": segments, "closed": False, "complete": False}
        out.append({**entry, "files": files})
    for name in KINDS:
        metadata = rank / "arrays.zarr" / name / "zarr.json"
        document = json.loads(metadata.read_text())
        document["shape"][0] = prompts * PROMPT
        metadata.write_text(json.dumps(document))
    last = {"rows": prompts * PROMPT, "segments": {}, "closed": True, "complete": True}
    (rank / "journal").write_bytes(b"".join(encode_line(line) for line in [*out, last]))
    return prompts * PROMPT


def link_shards(rank: Path, kind: str, rows: int, files: dict[str, Any]) -> None:
    """Link the shards that rows up to `rows` need to the first, and note them in `files`."""
    folder = rank / "arrays.zarr" / kind
    array = zarr.open_array(folder, mode="r")
    assert array.shards is not None
    for shard in range(1, -(-rows // array.shards[0])):
        for first in folder.glob("c.0.*"):
            new = folder / first.name.replace("c.0.", f"c.{shard}.", 1)
            if not new.exists():
                os.link(first, new)
                # What a checksum is of is not what is timed.
                files[new.relative_to(rank).as_posix()] = [first.stat().st_size, "0" * 8]


def _shifted(rows: Any, number: int) -> Any:
    by = {"row": PROMPT, "step": 1, "request": 1}
    for name, size in by.items():
        if name in rows.column_names:
            at = rows.column_names.index(name)
            column = rows[name].to_numpy() + number * size
            rows = rows.set_column(at, name, [column])
    return rows.cast(rows.schema)


def open_times(path: Path) -> dict[str, float]:
    """Milliseconds of what a reader does first; each the median of five new openings."""
    found: dict[str, list[float]] = {}

    def timed(name: str, call: Any) -> Any:
        started = time.perf_counter()
        value = call()
        found.setdefault(name, []).append(1e3 * (time.perf_counter() - started))
        return value

    for _ in range(5):
        trace = timed("open", lambda: kvtrace.open(path))
        timed("rows, status, layers", lambda t=trace: (t.rows, t.status, t.layers))
        timed("requests", trace.requests)
    return {name: statistics.median(times) for name, times in found.items()}


def show(results: list[Result]) -> None:
    columns = ("written MB/s", "", "read MB/s", "", "stored", "tile ms", "")
    table = Table("store", *columns)
    table.add_row("", "per core", "wall", "per core", "wall", "per byte", "median", "p95")
    for one in results:
        cells = list(asdict(one).values())
        table.add_row(cells[0], *(f"{x:,.2f}" if x < 10 else f"{x:,.0f}" for x in cells[1:]))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument("--commit", type=int, default=2048, metavar="ROWS")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    kinds: list[type[Store]] = [Trace, RawNumpy, PlainZarr]
    try:
        import h5py  # noqa: F401

        kinds += [Hdf5, Hdf5Gzip]
    except ImportError:
        print("without HDF5: pip install h5py to have it beside", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompt = record_prompt(folder)
        rows = load_rows(prompt)
        results = [measure(kind, rows, args.mb, args.commit, folder) for kind in kinds]
        show(results)
        big = folder / "big.kvtrace"
        count = enlarge(prompt, big, args.gb)
        opened = open_times(big)
        files = sum(1 for path in big.rglob("*") if path.is_file())
        print(f"{args.gb:g} GB trace, {count:,} rows, {files:,} files:")
        for what, milliseconds in opened.items():
            print(f"  {what}: {milliseconds:.0f} ms")
    if args.json:
        found = {"stores": [asdict(one) for one in results], "open_ms": opened}
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
