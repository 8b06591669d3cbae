r"""How fast block streams run through policies, on one core, on dense ids in memory.

    python benchmarks/blocks.py [--trace T] [--repeat 5]

Without a trace: reference sessions (tests/reference/sessions_a.jsonl), repeated with new ids until
there are about a million accesses. Where libCacheSim's Python package is installed (pip install
libcachesim), its native loop runs over the same accesses in the same process, pass for pass: its
process_trace over a file in its own binary form, so reading is part of it. Prints medians of
million accesses per second.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kvtrace
from kvtrace_viewer.blocks import POLICIES, BlockStream, dense_ids, lru_curve, read_stream
from kvtrace_viewer.blocks.distances import stack_distances

SESSIONS = Path(__file__).parents[1] / "tests/reference/sessions_a.jsonl"
ACCESSES = 1_000_000
#: Of the peer's hash table: its default, 24, spends most of a short run on making the table.
HASHPOWER = 18
PEERS = {
    "lru": "LRU",
    "fifo": "FIFO",
    "clock": "Clock",
    "lfu": "LFU",
    "sieve": "Sieve",
    "s3fifo": "S3FIFO",
    "arc": "ARC",
    "two_q": "TwoQ",
    "slru": "SLRU",
    "lirs": "LIRS",
    "lru_k": "LRUK",
    "wtinylfu": "WTinyLFU",
}


def sessions() -> BlockStream:
    """The reference sessions over and over, each time with blocks of their own."""
    lists = [json.loads(line)["hash_ids"] for line in SESSIONS.read_text().splitlines()]
    one = np.array([block for ids in lists for block in ids], np.int64)
    lengths = np.array([len(ids) for ids in lists])
    times = -(-ACCESSES // len(one))
    contents = np.concatenate([one + (one.max() + 1) * n for n in range(times)])
    blocks, number = dense_ids(contents)
    starts = np.concatenate([[0], np.cumsum(np.tile(lengths, times))])
    requests = len(starts) - 1
    tokens = np.full(len(blocks), 512, np.int32)
    return BlockStream(
        blocks=blocks,
        starts=starts,
        tokens=tokens,
        is_output=np.zeros(len(blocks), np.bool_),
        arrival_ns=np.arange(requests),
        prompt_tokens=512 * np.diff(starts),
        block_size=512,
        num_blocks=number,
    )


def rates(run: Callable[[], Any], accesses: int, repeat: int) -> list[float]:
    """Million accesses per second of each pass, after one that warms up."""
    run()
    found = []
    for _ in range(repeat):
        begin = time.perf_counter()
        run()
        found.append(accesses / (time.perf_counter() - begin) / 1e6)
    return found


def peer_run(stream: BlockStream, name: str, capacity: int, folder: Path) -> Callable[[], Any]:
    """libCacheSim's own loop over the same accesses."""
    peer = importlib.import_module("libcachesim")
    path = folder / "stream.oracleGeneral.bin"
    if not path.exists():
        following = np.where(stream.next_access == stream.accesses, -1, stream.next_access)
        with path.open("wb") as file:
            for i, (block, later) in enumerate(zip(stream.blocks, following, strict=True)):
                file.write(struct.pack("<IQIq", i, block, 1, later))

    def run() -> Any:
        reader = peer.TraceReader(str(path), trace_type=peer.TraceType.ORACLE_GENERAL_TRACE)
        return getattr(peer, name)(cache_size=capacity, hashpower=HASHPOWER).process_trace(reader)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", type=Path, help="a trace with blocks")
    parser.add_argument("--repeat", type=int, default=5, help="passes (default: 5)")
    parser.add_argument("--policy", action="append", help="only these")
    args = parser.parse_args()
    stream = read_stream(kvtrace.open(args.trace)) if args.trace else sessions()
    capacity = max(1, stream.num_blocks // 20)
    print(f"{stream.accesses:,} accesses of {stream.num_blocks:,} blocks, capacity {capacity:,}")
    contents = stream.blocks.astype(np.int64)
    measure("ids, nearly dense", lambda: dense_ids(contents), stream, args.repeat)
    hashes = contents * 2_654_435_761
    measure("ids, hashes", lambda: dense_ids(hashes), stream, args.repeat)
    distances = lambda: stack_distances(stream.blocks, stream.num_blocks)  # noqa: E731
    measure("stack distances", distances, stream, args.repeat)
    measure("exact lru curve", lambda: lru_curve(stream), stream, args.repeat)
    has_peer = importlib.util.find_spec("libcachesim") is not None
    if not has_peer:
        print("libCacheSim's package is not installed: no peer")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.policy or POLICIES:
            policy = POLICIES[name]()
            ours = rates(lambda p=policy: p.run(stream, capacity), stream.accesses, args.repeat)
            line = f"{name:18} {statistics.median(ours):8.1f}"
            if has_peer and name in PEERS:
                run = peer_run(stream, PEERS[name], capacity, Path(folder))
                line += f" {statistics.median(rates(run, stream.accesses, args.repeat)):8.1f} peer"
                misses = run()[0]
                hits = int((policy.run(stream, capacity).hits == 1).sum())
                line += f"   hit ratio {hits / stream.accesses:.4f}, peer {1 - misses:.4f}"
            print(line, flush=True)


def measure(name: str, run: Callable[[], Any], stream: BlockStream, repeat: int) -> None:
    """Print the median of one thing."""
    print(f"{name:18} {statistics.median(rates(run, stream.accesses, repeat)):8.1f}", flush=True)


if __name__ == "__main__":
    main()
