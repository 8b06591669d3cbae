"""Measure this machine's memory, disk and, where torch sees one, its GPU link."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kvtrace.errors import InputError
from kvtrace_viewer.tiers.hardware import Tier

REPEATS = 5
COPIED = 256 << 20
WRITTEN = 256 << 20
PIECE = 2 << 20


@dataclass(frozen=True)
class Measured:
    """A disk's figures: bytes per second, and seconds of one small read."""

    read: float
    write: float
    latency: float


def calibrate(folder: Path) -> str:
    """Measure, and return a hardware file as TOML.

    Parameters
    ----------
    folder : Path
        On the disk to measure; 256 MiB are written there and removed.

    Raises
    ------
    InputError
        Where the folder cannot be written to.
    """
    memory = _memory_bytes()
    try:
        disk = measure_disk(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error}); a folder on the disk to measure, with 256"
            " MiB free, was expected; give another --folder"
        ) from error
    copy = measure_copy()
    below = Tier(
        "disk", free, disk.read, disk.write, disk.latency, f"measured in {folder}, cache bypassed"
    )
    gpu = _gpu()
    if gpu is None:
        tiers = [Tier("DRAM", memory, copy, copy, 0.0, "measured: copy within memory"), below]
    else:
        tiers = [*gpu(memory), below]
    return "\n".join(
        [
            f'name = "{os.uname().nodename}, measured {time.strftime("%Y-%m-%d")}"',
            "# How fast it computes is not measured: set it, or give --prefill-tokens-per-s.",
            *(_as_toml(tier) for tier in tiers),
        ]
    )


def measure_copy() -> float:
    """Bytes per second of a copy within memory, one thread: the median of five."""
    source = np.ones(COPIED, np.uint8)
    target = np.empty_like(source)

    def copy() -> None:
        target[:] = source

    copy()
    return COPIED / _median(copy)


def measure_disk(folder: Path) -> Measured:
    """Sequential reads and writes of 2 MiB pieces past the page cache, and reads of 4 KiB."""
    piece = mmap.mmap(-1, PIECE)
    # Zeros could be compressed away by the file system.
    piece[:] = np.random.default_rng(0).bytes(PIECE)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kvtrace-calibrate-") as file:
        path = Path(file.name)

        def write() -> None:
            with direct_file(path, os.O_WRONLY) as disk:
                for at in range(0, WRITTEN, PIECE):
                    os.pwrite(disk, piece, at)
                os.fsync(disk)

        def read() -> None:
            with direct_file(path, os.O_RDONLY) as disk:
                for at in range(0, WRITTEN, PIECE):
                    os.preadv(disk, [piece], at)

        small = mmap.mmap(-1, 4096)
        places = np.random.default_rng(1).integers(0, WRITTEN // 4096, 200) * 4096

        def seek() -> None:
            with direct_file(path, os.O_RDONLY) as disk:
                for at in places:
                    os.preadv(disk, [small], int(at))

        written = WRITTEN / _median(write)
        return Measured(WRITTEN / _median(read), written, _median(seek) / len(places))


@contextmanager
def direct_file(path: Path, flags: int) -> Iterator[int]:
    """Open a file past the page cache where its file system lets us, else drop its cache first."""
    try:
        number = os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError:
        number = os.open(path, flags)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        yield number
    finally:
        os.close(number)


def _gpu() -> Callable[[int], list[Tier]] | None:
    """What measures the first GPU; None where torch is not installed or sees none."""
    if find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None

    def measure(memory: int) -> list[Tier]:
        device: Any = torch.device("cuda:0")
        near = torch.empty(COPIED, dtype=torch.uint8, device=device)
        other = torch.empty_like(near)
        host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)

        def timed(target: Any, source: Any) -> float:
            def copy() -> None:
                target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()

            copy()
            return COPIED / _median(copy)

        properties = torch.cuda.get_device_properties(device)
        # A copy reads and writes: twice its bytes cross the memory bus.
        own = 2 * timed(other, near)
        return [
            Tier("HBM", properties.total_memory, own, own, 0.0, f"measured: {properties.name}"),
            Tier(
                "DRAM",
                memory,
                timed(near, host),
                timed(host, near),
                10e-6,
                "measured: copies from and to pinned memory; latency is an assumption",
            ),
        ]

    return measure


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _median(action: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _as_toml(tier: Tier) -> str:
    return "\n".join(
        [
            "",
            "[[tier]]",
            f'name = "{tier.name}"',
            f"capacity = {tier.capacity}",
            f"read = {tier.read:.4g}",
            f"write = {tier.write:.4g}",
            f"latency = {tier.latency:.3g}",
            f'source = "{tier.source}"',
        ]
    )
