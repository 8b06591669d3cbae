r"""The smallest budget that loses at most a given share, and what it saves.

Replays a policy over a range of budgets in one pass, with the oracle beside it: of the loss, what
no policy could have kept under that budget is the capacity's, the rest the policy's. Says the
smallest budget for the whole model, for each layer and for each KV head (--by layer, --by head),
and the bytes of the KV cache that it saves at a context and a batch.

Example: kvtrace size traces/demo.kvtrace --policy h2o --lose 1% --by layer --context 4096 --batch 8
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rich.table import Table

import kvtrace
from kvtrace.console import console, progress
from kvtrace.errors import InputError

if TYPE_CHECKING:
    from kvtrace_viewer.replay.sizing import Place, Point, Sizing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    parser.add_argument(
        "--policy", required=True, metavar="NAME[:KEY=VALUE,...]", help="the policy to size"
    )
    parser.add_argument(
        "--lose", required=True, metavar="P%", help="the most that may be lost, such as 1%%"
    )
    parser.add_argument(
        "--of",
        choices=("mass", "output_error"),
        default="mass",
        help="what is lost: attention (1 - retained mass), or the mean relative error of the "
        "attention output (default: mass)",
    )
    parser.add_argument(
        "--budget",
        default="2%..100%/2%",
        metavar="A..B/STEP",
        help="budgets that are tried, in one pass (default: 2%%..100%%/2%%)",
    )
    parser.add_argument(
        "--when", metavar="RHYTHM", help="as of kvtrace replay (default: the policy's own)"
    )
    parser.add_argument(
        "--request",
        action="append",
        type=int,
        metavar="N",
        help="only this request; may be given several times (default: all)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a sequence, for the bytes (default: of the longest replayed)",
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="sequences, for the bytes (default: 1)"
    )
    parser.add_argument(
        "--by",
        choices=("layer", "head"),
        help="also the smallest budget of each layer, or of each KV head (default: both)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Replay, choose, count bytes, print."""
    from kvtrace_viewer.replay.sizing import size

    trace = kvtrace.open(args.trace)
    lose = _share(args.lose)
    for name in ("batch", "context"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; at least 1 was expected; write --{name} 1")
    with progress("replaying") as tell:
        found = size(
            trace, args.policy, lose, args.of, args.when, args.request, args.budget, progress=tell
        )
    asked = [r for r in trace.requests() if not args.request or r.request in args.request]
    context = args.context or max(r.tokens for r in asked)
    document = _document(trace, args, found, context)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        _show(document, found)
    return 0


def _share(text: str) -> float:
    from kvtrace_viewer.replay.amounts import parse_amount

    # parse_amount takes tokens too, and so would speak of them.
    percent = parse_amount(text, "--lose", "--lose 1%").percent if text.endswith("%") else None
    if percent is None:
        raise InputError(f"--lose is {text!r}; a percentage was expected; write --lose 1%")
    return float(percent) / 100


def _document(
    trace: kvtrace.Trace, args: argparse.Namespace, found: Sizing, context: int
) -> dict[str, Any]:
    from kvtrace_viewer.replay.amounts import parse_budget
    from kvtrace_viewer.replay.sizing import bytes_held, total_bytes
    from kvtrace_viewer.replay.spec import parse_policy

    def held_by(kind: str) -> dict[Place, tuple[int, int]]:
        def budget_of(place: Place) -> Any:
            layer, head = place
            at = {"all": (None, None), "layer": (layer, None), "head": (layer, head)}[kind]
            point = found.smallest(at) if at in found.curves else None
            return None if point is None else parse_budget(point.budget)

        return bytes_held(trace, args.request, context, args.batch, budget_of)

    held = {kind: held_by(kind) for kind in ("all", "layer", "head")}

    def row(kind: str, place: Place) -> dict[str, Any]:
        saved = total_bytes(held[kind], place)["saved"]
        return {**_row(found.smallest(place)), "saved": saved}

    document = {
        "policy": args.policy,
        "of": args.of,
        "lose": found.lose,
        "when": found.when,
        "context": context,
        "batch": args.batch,
        "bytes_are": "read" if parse_policy(args.policy).selects else "held",
        "model": row("all", (None, None)),
    }
    if args.by != "head":
        places = found.places("layer")
        document["layers"] = [{"layer": place[0], **row("layer", place)} for place in places]
    if args.by != "layer":
        document["heads"] = [
            {"layer": place[0], "kv_head": place[1], **row("head", place)}
            for place in found.places("head")
        ]
    document["bytes"] = {kind: total_bytes(one, (None, None)) for kind, one in held.items()}
    document["curve"] = [_row(point) for point in found.curves[None, None]]
    return document


def _row(point: Point | None) -> dict[str, Any]:
    """A budget with its loss; of lost mass the part of the capacity and that of the policy."""
    if point is None:
        return {"budget": None, "loss": None, "capacity": None, "policy": None}
    policy = None if point.capacity is None else point.loss - point.capacity
    return {
        "budget": point.budget,
        "loss": point.loss,
        "capacity": point.capacity,
        "policy": policy,
    }


def _show(document: dict[str, Any], found: Sizing) -> None:
    out = console()
    table = Table()
    reads = document["bytes_are"] == "read"
    saved = "not read" if reads else "saved"
    for name in ("budget", "for", "lost", "of it capacity", "of it the policy", f"bytes {saved}"):
        table.add_column(name, justify="left" if name == "for" else "right")
    table.add_row(*_cells(document["model"], "the whole model"))
    layers, heads = document.get("layers", []), document.get("heads", [])
    for row in layers:
        table.add_row(*_cells(row, f"layer {row['layer']}"))
    for row in heads:
        table.add_row(*_cells(row, f"layer {row['layer']}, KV head {row['kv_head']}"))
    out.print(
        f"{document['policy']}, --when {found.when}: the smallest budget that loses at most "
        f"{found.lose:.4g} of {found.of.replace('_', ' ')}",
        markup=False,
    )
    out.print(table)
    if any(row["budget"] is None for row in (document["model"], *layers, *heads)):
        out.print("-: no budget that was tried loses so little")
    what = "Read by a query, of what stays stored of the " if reads else ""
    cache = f"{what}KV cache of {document['batch']} x {document['context']:,} tokens:"
    out.print(cache, markup=False)
    names = {"all": "one budget for all", "layer": "one a layer", "head": "one a KV head"}
    for kind, name in names.items():
        one = document["bytes"][kind]
        share = one["saved"] / one["full"] if one["full"] else 0.0
        out.print(
            f"  {name}: {one['kept']:,} of {one['full']:,} bytes, {one['saved']:,} {saved}"
            f" ({share:.1%})",
            markup=False,
        )


def _cells(row: dict[str, Any], place: str) -> tuple[str, ...]:
    shares = (row["loss"], row["capacity"], row["policy"])
    numbers = ("-" if x is None else f"{x:z.4f}" for x in shares)
    return (row["budget"] or "-", place, *numbers, f"{row['saved']:,}")
