"""The processes of one trace: who makes the trace, and which folder each of them owns."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import TraceError
from kvtrace.layout import rank_directory
from kvtrace.manifest import Manifest, is_trace, read_manifest

#: Numbers of rank r begin at r times this.
NUMBERS_PER_RANK = 1_000_000_000
#: Columns that number things over all ranks, in every table; and where only one table does.
_NUMBERED = {
    "row",
    "query_row",
    "step",
    "request",
    "model",
    "encoder_request",
    "block",
    "parent",
}
_NUMBERED_IN = {("forks", "source"), ("kv_pools", "first_block")}

Column = Sequence[Any] | NDArray[Any]


def number_label(number: int) -> str:
    """A number as people are shown it: `3`, or `rank 1: 3` in another rank than the first."""
    rank, own = divmod(number, NUMBERS_PER_RANK)
    return f"rank {rank}: {own}" if rank else str(own)


def make_trace(path: Path, manifest: Manifest, *, force: bool) -> None:
    """Make the directory of a trace and its manifest, or join the trace of one's own launch.

    Parameters
    ----------
    path : pathlib.Path
        The trace directory.
    manifest : Manifest
        Of the trace to make. Where the one that is there has the same launch, it stays.
    force : bool
        Replace an older trace.

    Raises
    ------
    TraceError
        Where `path` exists, may not be replaced and is not of this launch, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if manifest.launch is None:
            _replace(path, manifest, force=force)
            return
        with _alone_in(path.parent):
            if not is_trace(path) or read_manifest(path).launch != manifest.launch:
                _replace(path, manifest, force=force)
    except OSError as error:
        raise TraceError(
            f"{path} cannot be made ({error.strerror or error}); a folder that can be written was"
            " expected; choose another with --out, or make room"
        ) from error


def discard_empty(trace: Path) -> None:
    """Remove a trace that no process wrote into."""
    if is_trace(trace) and not any(trace.glob("rank-*")):
        shutil.rmtree(trace)


def claim_rank(trace: Path, rank: int | None) -> int:
    """Make the folder of a rank, which belongs to the caller from here on.

    Parameters
    ----------
    trace : pathlib.Path
        The trace directory.
    rank : int or None
        The rank asked for; None: the next free number.

    Raises
    ------
    TraceError
        Where another process has that rank.
    """
    if rank is not None:
        try:
            (trace / rank_directory(rank)).mkdir()
        except FileExistsError:
            raise TraceError(
                f"rank {rank} of {trace} is taken; a free one was expected; record into another"
                " trace"
            ) from None
        return rank
    number = 0
    while True:
        try:
            return claim_rank(trace, number)
        except TraceError:
            number += 1


def _replace(path: Path, manifest: Manifest, *, force: bool) -> None:
    check_new_path(path, force=force)
    if is_trace(path):
        shutil.rmtree(path)
    path.mkdir(exist_ok=True)
    manifest.write(path)


def check_new_path(path: Path, *, force: bool) -> None:
    """Refuse a path where no trace may be made; for callers with slow work before the writing.

    Raises
    ------
    TraceError
        Where `path` is something else than a trace or an empty directory, or is a trace and
        `force` is not given.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_trace(path):
        raise TraceError(
            f"{path} exists and is not a trace; a new path was expected; choose another --out"
        )
    if not force:
        raise TraceError(
            f"{path} exists; a new path was expected; choose another --out,"
            " or --force to replace it"
        )


def numbered(table: str, values: Mapping[str, Column], rank: int) -> Mapping[str, Column]:
    """Columns as they stand in the trace, from those of a rank that counts from 0.

    `run` becomes the rank; numbers of rows, steps, requests, models and blocks move into the
    rank's own range, so that no two ranks ever give one number twice.
    """
    if rank == 0:
        return values
    first = rank * NUMBERS_PER_RANK
    found = dict(values)
    for name, column in values.items():
        if name == "run":
            found[name] = _shifted(column, rank)
        elif is_numbered(table, name):
            found[name] = _shifted(column, first)
    return found


def is_numbered(table: str, column: str) -> bool:
    """Whether a column holds numbers of which each rank has its own range."""
    return column in _NUMBERED or (table, column) in _NUMBERED_IN


def _shifted(column: Column, by: int) -> Column:
    if isinstance(column, np.ndarray):
        return np.asarray(column.astype(np.int64) + by)
    return [None if number is None else number + by for number in column]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep the other processes of a launch out; the lock dies with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
