"""Does the tier model's disk time come true? Really move what a replay says is moved.

A workload is replayed over this machine's memory and disk, as `kvtrace tiers calibrate` measures
them; then blocks of that size are read from and written to a file in the replay's order, past the
page cache, and the time is compared with the predicted one.

    python benchmarks/tiers.py conversation.kvtrace --requests 400
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import kvtrace
from kvtrace_viewer.blocks import BlockStream, read_stream
from kvtrace_viewer.tiers import Hardware, Options, ServedModel, TierResult, replay_tiers
from kvtrace_viewer.tiers.calibrate import direct_file, measure_copy, measure_disk
from kvtrace_viewer.tiers.hardware import Tier
from kvtrace_viewer.tiers.run import USABLE

BLOCK = 2 << 20


def main() -> None:
    """Calibrate, replay, move, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="an imported workload")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--memory-blocks", type=int, default=400)
    parser.add_argument("--disk-blocks", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    stream = first_requests(read_stream(kvtrace.open(args.trace)), args.requests)
    for mode in ("evict", "write-through"):
        rounds = []
        for _ in range(args.repeats):
            # Measured anew before every round: a shared disk is not the same a minute later.
            result = replayed(stream, mode, args)
            took = moved(result, args.folder, args.disk_blocks)
            rounds.append((predicted(result), took))
        guess, took = (statistics.median(column) for column in zip(*rounds, strict=True))
        ledger = result.ledger
        print(
            json.dumps(
                {
                    "mode": mode,
                    "blocks_read": int(ledger.up[:, 1].sum()),
                    "blocks_written": int(ledger.down[:, 1].sum()),
                    "block_bytes": result.block_bytes,
                    "predicted_s": round(guess, 3),
                    "measured_s": round(took, 3),
                    "measured_over_predicted": [round(t / g, 3) for g, t in rounds],
                }
            )
        )


def first_requests(stream: BlockStream, count: int) -> BlockStream:
    """The stream's first requests."""
    last = int(stream.starts[min(count, stream.requests)])
    return replace(
        stream,
        blocks=stream.blocks[:last],
        starts=stream.starts[: count + 1],
        tokens=stream.tokens[:last],
        is_output=stream.is_output[:last],
        arrival_ns=stream.arrival_ns[:count],
        prompt_tokens=stream.prompt_tokens[:count],
    )


def replayed(stream: BlockStream, mode: str, args: argparse.Namespace) -> TierResult:
    """The workload over this machine's memory and disk as they are now."""
    disk, copy = measure_disk(args.folder), measure_copy()
    memory = int(args.memory_blocks * BLOCK / USABLE) + 1
    hardware = Hardware(
        "this machine",
        (
            Tier("memory", memory, copy, copy, 0, "measured"),
            Tier("disk", args.disk_blocks * BLOCK, disk.read, disk.write, disk.latency, "measured"),
        ),
    )
    model = ServedModel(
        name="blocks of 2 MiB",
        kv_bytes_per_token=BLOCK // stream.block_size,
        parameters=0,
        layers=1,
        ns_per_token=1.0,
    )
    return replay_tiers(stream, hardware, model, Options(mode=mode, load="always", overlap=False))


def predicted(result: TierResult) -> float:
    """Seconds that the model gives the link, both directions one after the other."""
    disk = result.hardware.tiers[1]
    up, down = (moved[:, 1] for moved in (result.ledger.up, result.ledger.down))
    seconds = up * result.block_bytes / disk.read + down * result.block_bytes / disk.write
    return float(seconds.sum() + disk.latency * ((up > 0).sum() + (down > 0).sum()))


def moved(result: TierResult, folder: Path, slots: int) -> float:
    """Seconds of really moving the same blocks in the same order."""
    piece = mmap.mmap(-1, result.block_bytes)
    piece[:] = np.random.default_rng(0).bytes(result.block_bytes)
    places = np.random.default_rng(1)
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix=".kvtrace-tiers-") as file,
        direct_file(Path(file.name), os.O_RDWR) as disk,
    ):
        # Every slot is written once before: nothing is read that was not there.
        for slot in range(slots):
            os.pwrite(disk, piece, slot * result.block_bytes)
        os.fsync(disk)
        began = time.perf_counter()
        for up, down in zip(result.ledger.up[:, 1], result.ledger.down[:, 1], strict=True):
            first = int(places.integers(slots))
            for n in range(int(up)):
                os.preadv(disk, [piece], (first + n) % slots * result.block_bytes)
            for n in range(int(down)):
                os.pwrite(disk, piece, (first + n) % slots * result.block_bytes)
        os.fsync(disk)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
