r"""Run the blocks that a workload asked for through block policies at several capacities.

Every policy is asked at every capacity. The blocks come from an imported workload (kvtrace import
mooncake, weka, lmcache or qwen-bailian), from the tokens of a recorded run, cut into blocks of any
size, or from the KV events of a serving engine.

Example: kvtrace blocks conversation.kvtrace --policy lru --policy s3fifo --policy belady \
             --capacity 10000 --capacity 30000 --hits prefix
         kvtrace blocks conversation.kvtrace --policy lru --policy sieve --curve
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

import kvtrace
from kvtrace.console import console, progress
from kvtrace.errors import InputError

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
        metavar="NAME|FILE.py:Class[:KEY=VALUE,...]",
        help="a policy, or a file with one of your own, which is run, and its parameters; may be "
        "given several times (list below)",
    )
    parser.add_argument(
        "--capacity",
        action="append",
        default=[],
        type=int,
        metavar="N",
        help="blocks that the cache holds; may be given several times; needed without --curve",
    )
    parser.add_argument(
        "--curve",
        action="store_true",
        help="hits over capacity: lru at all capacities by one pass, the others run at each; "
        "without --capacity at 24 from a thousandth of the distinct blocks to all",
    )
    parser.add_argument(
        "--sample",
        type=float,
        metavar="SHARE",
        help="with --curve: lru from a share of the blocks, with its error, for long streams",
    )
    parser.add_argument(
        "--pin",
        type=int,
        default=0,
        metavar="N",
        help="never evict the first N blocks of a prompt, under any policy (default: 0)",
    )
    parser.add_argument(
        "--hold",
        type=_hold,
        default=0,
        metavar="N|service",
        help="never evict blocks of requests in service, under any policy: those of the last N "
        "requests, or, of a recorded run, of each from its first step to its last (default: 0)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="tokens of a block, of a recorded run (default: its cache's own, or 16)",
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
    parser.add_argument(
        "--export-vllm",
        type=Path,
        metavar="FILE.py",
        help="write the policy (one --policy) as a module that vLLM's KV offloading takes",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.epilog = "policies:\n" + _policies()


def _hold(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def run(args: argparse.Namespace) -> int:
    """Run, print."""
    from kvtrace_viewer.blocks import Accounting, read_stream, replay_blocks, replay_curves
    from kvtrace_viewer.blocks.storage import store

    if not args.curve and (args.sample is not None or not args.capacity):
        raise InputError(
            "no --curve was found, and no --capacity or a --sample; capacities, or a curve, were"
            " expected; add --capacity 10000, say, or --curve"
        )
    accounting = Accounting(hits=args.hits, blocks=args.blocks, unit=args.unit)
    trace = kvtrace.open(args.trace)
    stream = read_stream(trace, args.block_size)
    with progress("replaying") as tell:
        if args.curve:
            results = replay_curves(
                stream,
                args.policy,
                args.capacity,
                accounting,
                args.sample,
                tell,
                args.pin,
                args.hold,
            )
        else:
            results = replay_blocks(
                stream, args.policy, args.capacity, accounting, tell, args.pin, args.hold
            )
    store(trace, results, stream.block_size)
    if args.export_vllm:
        _export(args.policy, args.export_vllm)
    if args.json:
        print(json.dumps([result.to_json() for result in results], indent=1))
    else:
        _show(stream, results, curve=args.curve)
    return 0


def _export(policies: list[str], path: Path) -> None:
    from kvtrace_viewer.blocks import parse_block_policy
    from kvtrace_viewer.blocks.offload import export_vllm

    if len(policies) != 1:
        raise InputError(
            f"--export-vllm writes one policy; {len(policies)} were given; leave one --policy"
        )
    text = export_vllm(parse_block_policy(policies[0]))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); a file to write was expected; choose"
            " another place"
        ) from error


def _policies() -> str:
    from kvtrace_viewer.blocks import POLICIES
    from kvtrace_viewer.blocks.spec import describe, idea

    lines = []
    for name, kind in POLICIES.items():
        lines.append(f"  {name:<16} {idea(kind)}")
        if takes := describe(kind):
            lines.append(f"  {'':<16} takes {takes}")
    return "\n".join(lines)


def _show(stream: BlockStream, results: list[BlockResult], *, curve: bool) -> None:
    out = console()
    out.print(
        f"{stream.requests:,} requests, {stream.accesses:,} accesses of {stream.num_blocks:,}"
        f" blocks of {stream.block_size} tokens ({stream.source})",
        markup=False,
    )
    out.print(_curve_table(results) if curve else _table(results))
    accounting = results[0].accounting
    out.print(
        f"counted: hits per {accounting.hits}, {accounting.blocks} blocks, by {accounting.unit}"
    )
    for note in dict.fromkeys(note for result in results for note in result.notes):
        out.print(f"note: {note}", markup=False)


def _table(results: list[BlockResult]) -> Table:
    table = Table("policy")
    for name in ("capacity", "accesses", "hits", "hit ratio", "evictions"):
        table.add_column(name, justify="right")
    for r in results:
        numbers = (f"{r.accesses:,}", f"{r.hits:,}", _ratio(r), f"{r.evictions:,}")
        table.add_row(r.policy, f"{r.capacity:,}", *numbers)
    return table


def _curve_table(results: list[BlockResult]) -> Table:
    """Hit ratios, a row a capacity, a column a policy."""
    specs = list(dict.fromkeys(result.policy for result in results))
    found = {(result.policy, result.capacity): result for result in results}
    table = Table(title="hit ratio")
    for name in ("capacity", *specs):
        table.add_column(name, justify="right")
    for capacity in dict.fromkeys(result.capacity for result in results):
        ratios = (_ratio(found[spec, capacity]) for spec in specs)
        table.add_row(f"{capacity:,}", *ratios)
    return table


def _ratio(result: BlockResult) -> str:
    if result.hit_ratio is None:
        return "-"
    error = "" if result.error is None else f" ± {result.error:.4f}"
    return f"{result.hit_ratio:.4f}{error}"
