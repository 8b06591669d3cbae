r"""Follow the blocks of a paged cache, and serve the same requests from other pools.

Shown are the recorded pool, where there is one, and a server a combination of the settings given,
by what it does to the recorded arrivals and lengths: what waits, what is preempted, how full the
pool is, how much of it is wasted. Settings that are not given stay as recorded. Kept in the trace
as tables allocation_*.

Example: kvtrace allocation run.kvtrace
         kvtrace allocation run.kvtrace --pool 64,128,256 --block-size 8,16 --policy lru
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table

import kvtrace
from kvtrace.console import console, human_bytes, progress
from kvtrace.errors import InputError

if TYPE_CHECKING:
    from kvtrace_viewer.allocation.contiguous import ContiguousUse
    from kvtrace_viewer.allocation.result import PoolResult

_NUMBERS = {
    "block_size": "tokens of a block",
    "pool": "blocks; with --block-size alone, as many as fit the recorded memory",
    "max_batch": "requests that a step processes",
    "max_batch_tokens": "tokens that a step processes",
    "swap_blocks": "blocks that fit where --preempt swap copies to (default: as many as the pool)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from kvtrace_viewer.allocation.pool import POLICIES
    from kvtrace_viewer.allocation.settings import ADMISSIONS, PREEMPTIONS

    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    for name, text in _NUMBERS.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), default="", metavar="N[,N...]", help=text
        )
    for name, known in (
        ("admission", ADMISSIONS),
        ("policy", POLICIES),
        ("preempt", PREEMPTIONS),
    ):
        meanings = "; ".join(f"{value}: {text}" for value, text in known.items())
        parser.add_argument(f"--{name}", default="", metavar="NAME[,NAME...]", help=meanings)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Follow, simulate, keep, print."""
    from kvtrace_viewer.allocation.contiguous import contiguous
    from kvtrace_viewer.allocation.observed import NO_BLOCKS, has_blocks
    from kvtrace_viewer.allocation.result import PoolResult
    from kvtrace_viewer.allocation.storage import store
    from kvtrace_viewer.allocation.whatif import sweep

    given = _given(args)
    trace = kvtrace.open(args.trace)
    whole = contiguous(trace)
    results = [PoolResult.recorded(trace)] if has_blocks(trace) else []
    if any(given.values()):
        with progress("simulating") as tell:
            results += [PoolResult.of(one) for one in sweep(trace, given, tell)]
    if not results and whole is None:
        raise InputError(f"{trace.path} has no events of KV memory; {NO_BLOCKS}; record one")
    names = [store(trace, result) for result in results]
    if args.json:
        found = [
            {"allocation_run": name, **result.to_json()}
            for name, result in zip(names, results, strict=True)
        ]
        print(json.dumps(found if whole is None else [*found, _whole_json(whole)], indent=1))
    else:
        _show(results, whole)
    return 0


def _given(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Values of the settings on the command line."""
    found: dict[str, list[Any]] = {}
    for name in (*_NUMBERS, "admission", "policy", "preempt"):
        texts = [text.strip() for text in getattr(args, name).split(",") if text.strip()]
        read: Callable[[str], Any] = str
        if name in _NUMBERS:
            bad = [text for text in texts if not text.isdecimal()]
            if bad:
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"{option} {bad[0]!r} is no number; whole numbers were expected, with commas"
                    f" between; write {option} 64,128"
                )
            read = int
        found[name] = list(dict.fromkeys(map(read, texts)))
    return found


def _show(results: list[PoolResult], whole: ContiguousUse | None) -> None:
    out = console()
    if results:
        out.print(_table(results))
        out.print(
            "waited: steps from arrival to first step; preempted for: steps missed after that, by"
            " requests that lost their blocks; both by request"
        )
        if any(result.what_if is not None for result in results):
            out.print(
                "tokens/s of other pools are of estimated steps, without what lies between steps:"
                " compare them with each other, one of the recorded settings among them"
            )
        reasons = [reason for result in results for reason in result.refused.values()]
        for reason in dict.fromkeys(reasons):
            out.print(f"refused: {reason}", markup=False)
        notes = [note for result in results for note in result.history.notes]
        for note in dict.fromkeys(notes):
            out.print(f"note: {note}", markup=False)
    if whole is not None:
        found = _whole_json(whole)
        out.print(
            f"contiguous caches: {human_bytes(found['peak_bytes'])} at most, in"
            f" {human_bytes(found['peak_reach_bytes'])} of addresses while tensors are copied;"
            f" external fragmentation {found['external_fragmentation']:.1%} on average"
        )


def _whole_json(whole: ContiguousUse) -> dict[str, Any]:
    return {
        "kind": "contiguous",
        "peak_bytes": int(whole.used_bytes.max()),
        "peak_reach_bytes": whole.peak_reach_bytes,
        "largest_hole_bytes": int(whole.hole_bytes.max()),
        "external_fragmentation": float(whole.external_fragmentation().mean()),
    }


def _table(results: list[PoolResult]) -> Table:
    """A row a run; settings that all share stand in no column."""
    table = Table("run")
    columns = (
        "pool",
        "steps",
        "preempted",
        "waited: mean",
        "p95",
        "preempted for",
        "held, mean",
        "peak",
        "unused slots",
        "evicted",
        "tokens/s",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for result in results:
        found = result.to_json()
        table.add_row(
            _label(result),
            f"{found['pool']:,} x {found['block_size']}",
            f"{found['steps']:,}",
            f"{found['preemptions']:,}",
            _number(found["wait_steps_mean"], ".1f"),
            _number(found["wait_steps_p95"], ".1f"),
            _number(found["preempted_steps_mean"], ".1f"),
            "-" if found["mean_occupancy"] is None else f"{found['mean_occupancy']:.1%}",
            f"{found['peak_blocks']:,}",
            f"{found['internal_fragmentation']:.1%}" if found["peak_blocks"] else "-",
            f"{found['evictions']:,}",
            _number(found["tokens_per_s"], ",.0f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _label(result: PoolResult) -> str:
    if result.what_if is None:
        return "recorded"
    settings = result.what_if.settings
    return f"{settings.policy}, {settings.admission}, {settings.preempt}"
