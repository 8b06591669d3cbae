"""Small segments to large ones, open tails to full shards, without a reader noticing.

A rank is written anew beside itself, and the two folders change places in one system call: a
reader finds the old one or the new one, whole. One that had opened the old one sees by the
journal, which is another file then, that it has to look again (`JournalReader.refresh`).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from kvtrace import database
from kvtrace.errors import TraceError
from kvtrace.layout import FORMAT_VERSION
from kvtrace.rewrite import SEGMENT_ROWS, Rewrite, count_parts
from kvtrace.sizes import directory_bytes
from kvtrace.store import StoreReader
from kvtrace.trace import Trace

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True)
class Compacted:
    """What became of a trace.

    Attributes
    ----------
    ranks : list of int
        The ranks that were written anew; the others were compact.
    segments, bytes : (int, int)
        Of them before and after.
    """

    ranks: list[int]
    segments: tuple[int, int]
    bytes: tuple[int, int]


def compact(trace: Trace, progress: Callable[[float], None] = lambda share: None) -> Compacted:
    """Write the ranks of a trace anew that are in small pieces, each in the place of its old self.

    What a replay wrote is never in small pieces and stays as it is.

    Raises
    ------
    TraceError
        Where the trace is being recorded or compacted, was written by a newer version, is damaged,
        or its disk cannot take it.
    """
    _check(trace)
    with _alone_in(trace.path):
        for left in trace.path.glob(".rank-*.compact"):
            # By a compaction that was killed.
            shutil.rmtree(left)
        stores = {rank: trace.store(rank) for rank in trace.ranks}
        stores = {rank: store for rank, store in stores.items() if not is_compact(store)}
        before = _size(stores)
        whole, done = sum(count_parts(store) for store in stores.values()) or 1, 0

        def tell() -> None:
            nonlocal done
            done += 1
            progress(done / whole)

        try:
            for store in stores.values():
                _replace(store, tell)
            if stores:
                database.build(trace.path)
        except OSError as error:
            raise TraceError(
                f"{trace.path} cannot be compacted ({error.strerror or error}); it is as it was;"
                " make room or `kvtrace merge` it to another disk"
            ) from error
    trace.refresh()
    return Compacted(list(stores), *zip(before, _size(stores), strict=True))


def is_compact(store: StoreReader) -> bool:
    """Whether a store is closed and its tables stand in as few segments as they may."""
    for files in store.state.segments.values():
        if len(files) > 1:
            rows = sum(pq.read_metadata(store.directory / name).num_rows for name in files)
            # A commit between two full segments leaves each a little longer than asked.
            if len(files) > rows // SEGMENT_ROWS + 1:
                return False
    return store.closed


def _check(trace: Trace) -> None:
    if trace.status == "recording":
        raise TraceError(
            f"{trace.path} is being recorded; one that has ended was expected; stop the recording"
        )
    written, ours = (
        tuple(map(int, version.split(".")))
        for version in (trace.manifest.format_version, FORMAT_VERSION)
    )
    if written > ours:
        raise TraceError(
            f"{trace.path} has format {trace.manifest.format_version}, of which this version knows"
            f" {FORMAT_VERSION} and would leave the rest out; install kvtrace"
            f" {trace.manifest.kvtrace_version} or newer"
        )


def _replace(store: StoreReader, tell: Callable[[], None]) -> None:
    place = store.directory
    aside = place.with_name(f".{place.name}.compact")
    # A reader of the old journal must not find another segment under an old name.
    names = [name for files in store.state.segments.values() for name in files]
    highest = max((int(Path(name).stem) for name in names), default=-1)
    try:
        Rewrite(first_segment=highest + 1, tell=tell).run(store, aside)
        exchange(aside, place)
    finally:
        # The new one that failed, or the old one.
        shutil.rmtree(aside, ignore_errors=True)
    store.refresh()


def exchange(one: Path, other: Path) -> None:
    """Let two folders of one file system change places at once.

    Raises
    ------
    OSError
        Where the system or the file system cannot do so.
    """
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def _size(stores: dict[int, StoreReader]) -> tuple[int, int]:
    segments = sum(len(files) for s in stores.values() for files in s.state.segments.values())
    return segments, sum(directory_bytes(store.directory) for store in stores.values())


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep another compaction out; the lock dies with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise TraceError(f"{folder} is being compacted; wait until that has ended") from error
    finally:
        os.close(handle)
