r"""Run the blocks that a workload asked for through block policies at several capacities.

Every policy is asked at every capacity. The blocks come from an imported workload (kvtrace import
mooncake, weka, lmcache or qwen-bailian).

Example: kvtrace blocks conversation.kvtrace --policy lru --policy s3fifo --policy belady \
             --capacity 10000 --capacity 30000 --hits prefix
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.table import Table

import kvtrace
from kvtrace.console import console, progress

if TYPE_CHECKING:
    from kvtrace_viewer.blocks import BlockResult, BlockStream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from kvtrace_viewer.blocks.accounting import MODES

    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    parser.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="NAME[:KEY=VALUE,...]",
        help="a policy and its parameters; may be given several times (list below)",
    )
    parser.add_argument(
        "--capacity",
        action="append",
        required=True,
        type=int,
        metavar="N",
        help="blocks that the cache holds; may be given several times",
    )
    for mode, values in MODES.items():
        default, *_ = values
        meanings = "; ".join(f"{value}: {text}" for value, text in values.items())
        parser.add_argument(
            f"--{mode}",
            choices=list(values),
            default=default,
            help=f"what counts: {meanings} (default: {default})",
        )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.epilog = "policies:\n" + _policies()


def run(args: argparse.Namespace) -> int:
    """Run, print."""
    from kvtrace_viewer.blocks import Accounting, read_stream, replay_blocks

    accounting = Accounting(hits=args.hits, blocks=args.blocks, unit=args.unit)
    stream = read_stream(kvtrace.open(args.trace))
    with progress("replaying") as tell:
        results = replay_blocks(stream, args.policy, args.capacity, accounting, tell)
    if args.json:
        print(json.dumps([result.to_json() for result in results], indent=1))
    else:
        _show(stream, results)
    return 0


def _policies() -> str:
    from kvtrace_viewer.blocks import POLICIES
    from kvtrace_viewer.blocks.spec import describe, idea

    lines = []
    for name, kind in POLICIES.items():
        lines.append(f"  {name:<16} {idea(kind)}")
        if takes := describe(kind):
            lines.append(f"  {'':<16} takes {takes}")
    return "\n".join(lines)


def _show(stream: BlockStream, results: list[BlockResult]) -> None:
    out = console()
    out.print(
        f"{stream.requests:,} requests, {stream.accesses:,} accesses of {stream.num_blocks:,}"
        f" blocks of {stream.block_size} tokens ({stream.source})",
        markup=False,
    )
    table = Table("policy")
    for name in ("capacity", "accesses", "hits", "hit ratio", "evictions"):
        table.add_column(name, justify="right")
    for r in results:
        ratio = "-" if r.hit_ratio is None else f"{r.hit_ratio:.4f}"
        numbers = (f"{r.accesses:,}", f"{r.hits:,}", ratio, f"{r.evictions:,}")
        table.add_row(r.policy, f"{r.capacity:,}", *numbers)
    out.print(table)
    accounting = results[0].accounting
    out.print(
        f"counted: hits per {accounting.hits}, {accounting.blocks} blocks, by {accounting.unit}"
    )
    for note in dict.fromkeys(note for result in results for note in result.notes):
        out.print(f"note: {note}", markup=False)
