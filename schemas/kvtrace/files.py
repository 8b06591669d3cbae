"""Writing the files of a store: each whole and at once, its length and checksum remembered."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from kvtrace.checksums import FileSum, extend_sum


class FileWriter:
    """Puts files under a folder, so that a reader finds the old one or the new one, whole.

    Parameters
    ----------
    root : pathlib.Path
        The folder; names are relative to it.
    durable : bool
        Whether a file has reached the disk before it takes its place, and its folder before
        `sync_folders` returns.
    """

    def __init__(self, root: Path, *, durable: bool = False) -> None:
        self.root, self.durable = root, durable
        self.written: dict[str, FileSum] = {}
        #: What kept a file from being written: from then on the folder misses something.
        self.failure: BaseException | None = None
        self._folders: set[Path] = set()
        # zarr writes the chunks of one call from several threads.
        self._lock = threading.Lock()

    def write(self, name: str, *parts: Any) -> None:
        """Write or replace a file: buffers that follow each other."""
        path = self.root / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            self._make_folder(path.parent)
            with temporary.open("wb", buffering=0) as file:
                found = _write_all(file.fileno(), parts)
                if self.durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException as error:
            self.failure = self.failure or error
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        with self._lock:
            self.written[name] = found
            self._folders.add(path.parent)

    def take(self, wanted: Callable[[str], bool]) -> dict[str, FileSum]:
        """Files written since, of those that are wanted; the others wait."""
        with self._lock:
            found = {name: what for name, what in self.written.items() if wanted(name)}
            self.written = {n: s for n, s in self.written.items() if n not in found}
        return found

    def remove(self, name: str) -> None:
        """Delete a file, which the journal will not list."""
        (self.root / name).unlink(missing_ok=True)
        with self._lock:
            self.written.pop(name, None)

    def check(self) -> None:
        """Raise again what kept a file from being written."""
        if self.failure is not None:
            raise self.failure

    def forget(self, prefix: str) -> None:
        """Files whose names begin so will be removed."""
        self.written = {n: s for n, s in self.written.items() if not n.startswith(prefix)}

    def sync_folders(self) -> None:
        """Bring the names of what was written to the disk, where that was asked for."""
        folders, self._folders = self._folders, set()
        if self.durable:
            for folder in sorted(folders):
                # A folder may be gone by now: the tail of what full shards hold.
                if folder.exists():
                    sync(folder)

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            with self._lock:
                self._folders.add(path.parent)


class ChunkStore(LocalStore):
    """zarr's store of a local folder, writing through a FileWriter.

    Parameters
    ----------
    root : pathlib.Path
        The `arrays.zarr` folder.
    files : FileWriter
        Of a folder above it.
    """

    def __init__(self, root: Path, files: FileWriter, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self._files = files
        self._prefix = root.relative_to(files.root).as_posix()

    def with_read_only(self, read_only: bool = False) -> Self:
        """See zarr's."""
        return type(self)(self.root, self._files, read_only=read_only)

    async def set(self, key: str, value: Buffer) -> None:
        """See zarr's."""
        self._check_writable()
        await asyncio.to_thread(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """See zarr's."""
        if not (self.root / key).exists():
            await self.set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """See zarr's."""
        self._files.write(f"{self._prefix}/{key}", value.as_buffer_like())


def sync(path: Path) -> None:
    """Bring a file, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, parts: Sequence[Any]) -> FileSum:
    size = crc = 0
    for part in parts:
        view = memoryview(part).cast("B")
        size += len(view)
        crc = extend_sum(crc, view)
        while view:
            view = view[os.write(handle, view) :]
    return FileSum(size, f"{crc:08x}")
