"""Pools that a program leaves behind end with it; those of the process it ran in do not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

from kvtrace_recorder.launch import wait_for_threads


def test_only_the_programs_pools_end(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as ours:
        ours.submit(int).result()
        before = threading.enumerate()
        theirs = ThreadPoolExecutor(2, thread_name_prefix="theirs")
        theirs.submit(int).result()
        # What stores traces may begin its own while the program runs.
        array = zarr.create_array(tmp_path / "a", shape=(64,), chunks=(8,), dtype="float32")
        array[...] = 1
        # A worker of ours that comes late.
        late = [ours.submit(threading.Event().wait, 0.1) for _ in range(2)]
        wait_for_threads(before)
        assert [future.result() for future in late] == [False, False]
        assert ours.submit(lambda: 7).result() == 7
        assert np.asarray(array[...]).sum() == 64
    assert ThreadPoolExecutor(1).submit(lambda: 8).result() == 8
    assert not [x for x in threading.enumerate() if x.name.startswith("theirs")]
