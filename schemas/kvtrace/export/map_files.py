"""The files that attention maps are written to, a block of rows at a time: Zarr and npz."""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

Float = NDArray[np.float32]
Ids = NDArray[np.int64]
#: Cells computed at a time: 16 MiB.
BLOCK_CELLS = 4 * 2**20
#: Rows and keys of a Zarr chunk: 1 MiB.
CHUNK = 512
#: Dates of files in an npz, so that the same maps make the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class LayerMap:
    """One layer's part of the maps: its query heads, positions of rows and of keys."""

    layer: int
    heads: list[int]
    rows: Ids
    keys: Ids

    @property
    def name(self) -> str:
        """Of the array."""
        return f"layer_{self.layer}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, rows, keys."""
        return len(self.heads), len(self.rows), len(self.keys)

    @property
    def block_rows(self) -> int:
        """Rows computed at a time: whole Zarr chunks, where it is more than one."""
        rows = max(1, BLOCK_CELLS // max(1, len(self.keys)))
        return rows if rows < CHUNK else rows // CHUNK * CHUNK


#: Takes the head's index, the first row's index and [row, key].
Write = Callable[[int, int, Float], None]


class MapFile(ABC):
    """A file that maps are written to."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    @abstractmethod
    def about(self, facts: dict[str, Any]) -> None:
        """Keep what the maps are of."""

    @abstractmethod
    def layer(self, part: LayerMap) -> AbstractContextManager[Write]:
        """A context that gives the way to write one layer, block after block."""


class ZarrMaps(MapFile):
    """A Zarr group."""

    def __init__(self, path: Path) -> None:
        self._group = zarr.open_group(path, mode="w-")

    def about(self, facts: dict[str, Any]) -> None:
        """Keep what the maps are of."""
        self._group.attrs.update(facts)

    @contextmanager
    def layer(self, part: LayerMap) -> Iterator[Write]:
        """Give the way to write one layer."""
        array = self._group.create_array(
            part.name,
            shape=part.shape,
            chunks=(1, min(CHUNK, part.block_rows), CHUNK),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=("head", "row", "key"),
        )

        def write(head: int, start: int, block: Float) -> None:
            array[head, start : start + len(block)] = block

        yield write


class NpzMaps(MapFile):
    """A file for numpy.load."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "x", allowZip64=True)

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def about(self, facts: dict[str, Any]) -> None:
        """Keep what the maps are of."""
        layers = facts.pop("layers")
        for name, axes in layers.items():
            for axis, numbers in axes.items():
                self._put(f"{name}_{axis}", np.asarray(numbers, np.int64))
        self._put("about", np.asarray(json.dumps(facts)))

    @contextmanager
    def layer(self, part: LayerMap) -> Iterator[Write]:
        """Give the way to write one layer."""
        with self._member(part.name) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": part.shape}
            np.lib.format.write_array_header_2_0(file, header)
            # Blocks come in the order of the array.
            yield lambda head, start, block: _put_bytes(file, block)

    def _put(self, name: str, values: NDArray[Any]) -> None:
        with self._member(name) as file:
            np.lib.format.write_array(file, values, allow_pickle=False)

    def _member(self, name: str) -> IO[bytes]:
        return self._zip.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True)


def _put_bytes(file: IO[bytes], block: Float) -> None:
    file.write(np.ascontiguousarray(block, "<f4").data)


MAP_FILES: dict[str, Callable[[Path], MapFile]] = {".zarr": ZarrMaps, ".npz": NpzMaps}
