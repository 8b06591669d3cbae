"""Serve a workload's blocks from memory tiers: HBM, DRAM, NVMe, remote.

Which tier serves how much, what crosses each link, and what it does to the time to the first token.
Prompts are served one after another. `kvtrace tiers calibrate` measures this machine instead, and
prints a file for --tiers.

Examples: kvtrace tiers conversation.kvtrace --tiers h100 --capacity DRAM=256GB --mode write-through
          kvtrace tiers calibrate > mine.toml
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

import kvtrace
from kvtrace.console import console, human_bytes
from kvtrace.errors import InputError
from kvtrace.sizes import parse_bytes
from kvtrace_viewer.tiers.options import LOADS, MODES
from kvtrace_viewer.tiers.order import ORDERS

if TYPE_CHECKING:
    from kvtrace_viewer.tiers import Hardware, ServedModel, TierResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from kvtrace_viewer.tiers.hardware import shipped

    parser.add_argument("trace", metavar="T", help="a .kvtrace directory, or: calibrate")
    parser.add_argument(
        "--tiers", default="h100", metavar="NAME|FILE.toml", help="the machine (default: h100)"
    )
    parser.add_argument(
        "--policy",
        choices=list(ORDERS),
        default="lru",
        help="what a tier gives up: "
        + "; ".join(f"{name}: {text}" for name, text in ORDERS.items())
        + " (default: lru)",
    )
    for option, known in (("--mode", MODES), ("--load", LOADS)):
        default, *_ = known
        meanings = "; ".join(f"{name}: {text}" for name, text in known.items())
        parser.add_argument(
            option, choices=list(known), default=default, help=f"{meanings} (default: {default})"
        )
    parser.add_argument(
        "--no-overlap", action="store_true", help="computing waits until all is loaded"
    )
    parser.add_argument(
        "--prefetch", action="store_true", help="load from a request's arrival on, while it waits"
    )
    parser.add_argument(
        "--capacity",
        action="append",
        default=[],
        metavar="TIER=SIZE",
        help="another capacity, 0 for none: DRAM=256GB; may be given several times",
    )
    parser.add_argument(
        "--bandwidth",
        action="append",
        default=[],
        metavar="TIER=SIZE",
        help="another bandwidth a second, both ways: NVMe=3GB; may be given several times",
    )
    model = parser.add_argument_group("the model (default: Llama-3-8B in 16 bit)")
    model.add_argument("--kv-bytes-per-token", metavar="SIZE", help="keys and values, all layers")
    model.add_argument("--parameters", type=float, metavar="N", help="such as 8e9")
    model.add_argument("--layers", type=int, metavar="N", help="attention layers")
    model.add_argument(
        "--prefill-tokens-per-s", type=float, metavar="X", help="how fast it computes, as measured"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="calibrate: on the disk to measure (default: .)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    lines = "\n".join(f"  {name:<14} {text}" for name, text in shipped().items())
    parser.epilog = f"machines:\n{lines}"


def run(args: argparse.Namespace) -> int:
    """Replay and print, or measure and print."""
    from kvtrace_viewer.blocks import read_stream
    from kvtrace_viewer.tiers import Options, read_hardware, replay_tiers
    from kvtrace_viewer.tiers.calibrate import calibrate

    if args.trace == "calibrate":
        print(calibrate(args.folder))
        return 0
    hardware = _changed(read_hardware(args.tiers), args)
    model = _model(args)
    options = Options(
        policy=args.policy,
        mode=args.mode,
        load=args.load,
        overlap=not args.no_overlap,
        prefetch=args.prefetch,
    )
    result = replay_tiers(read_stream(kvtrace.open(args.trace)), hardware, model, options)
    if args.json:
        print(json.dumps({"model": model.name, **result.to_json()}, indent=1))
    else:
        _show(model, result)
    return 0


def _changed(hardware: Hardware, args: argparse.Namespace) -> Hardware:
    """The machine with what the command line says of it."""
    for option in ("capacity", "bandwidth"):
        for text in getattr(args, option):
            tier, equals, size = text.partition("=")
            if not equals:
                raise InputError(
                    f"--{option} {text!r} has no =; TIER=SIZE was expected; write DRAM=256GB"
                )
            if option == "capacity":
                figure = 0 if size == "0" else parse_bytes(size, f"--capacity {tier}", "256GB")
                hardware = hardware.with_figure(tier, capacity=figure)
            else:
                figure = parse_bytes(size, f"--bandwidth {tier}", "3GB")
                hardware = hardware.with_figure(tier, read=figure, write=figure)
    return hardware


def _model(args: argparse.Namespace) -> ServedModel:
    """The model that the command line describes; what it leaves out is Llama-3-8B's."""
    from kvtrace_viewer.tiers import LLAMA_3_8B

    changed: dict[str, int | float | str] = {}
    if args.kv_bytes_per_token is not None:
        changed["kv_bytes_per_token"] = parse_bytes(
            args.kv_bytes_per_token, "--kv-bytes-per-token", "128KiB"
        )
    for name in ("parameters", "layers"):
        if (value := getattr(args, name)) is not None:
            if not value >= 1 or value == float("inf"):
                raise InputError(f"--{name} is {value}; at least 1 was expected; write --{name} 32")
            changed[name] = int(value)
    if args.prefill_tokens_per_s is not None:
        if not args.prefill_tokens_per_s > 0:
            raise InputError(
                f"--prefill-tokens-per-s is {args.prefill_tokens_per_s}; a number above 0 was"
                " expected; write --prefill-tokens-per-s 20000"
            )
        changed["ns_per_token"] = 1e9 / args.prefill_tokens_per_s
    if not changed:
        return LLAMA_3_8B
    return replace(LLAMA_3_8B, **{"name": "as given", **changed})  # type: ignore[arg-type]


def _show(model: ServedModel, result: TierResult) -> None:
    out = console()
    found = result.to_json()
    out.print(
        f"{found['requests']:,} requests on {found['hardware']}, blocks of"
        f" {human_bytes(result.block_bytes)} ({model.name})",
        markup=False,
    )
    table = Table("tier")
    for name in ("blocks", "hits", "moved up", "moved down", "link busy", "peak"):
        table.add_column(name, justify="right")
    for tier in found["tiers"]:
        busy = tier["link_busy"]
        table.add_row(
            tier["tier"],
            f"{tier['capacity_blocks']:,}",
            f"{tier['hits']:,}",
            human_bytes(tier["bytes_up"]),
            human_bytes(tier["bytes_down"]),
            "-" if busy is None else f"{busy:.1%}",
            human_bytes(tier["peak_bytes"]),
        )
    out.print(table)
    out.print(
        f"computed though found: {found['recomputed']:,} blocks; found nowhere:"
        f" {found['missed']:,}; last copy lost: {found['dropped']:,}"
    )
    if found["refused"]:
        out.print(f"refused, larger than the first tier: {found['refused']:,} requests")
    if found["ttft_s"]:
        ttft, stall = found["ttft_s"], found["stall_s"]
        out.print(
            f"time to first token: mean {ttft['mean']:.3f} s, p50 {ttft['p50']:.3f},"
            f" p95 {ttft['p95']:.3f}; stalled {stall['total']:.1f} s of {found['span_s']:.1f} s,"
            f" computing {found['compute_s']:.1f} s"
        )
    _warn(result)
    for note in found["notes"]:
        out.print(f"note: {note}", markup=False)


def _warn(result: TierResult) -> None:
    """Say where waiting, not the tiers, makes the times."""
    arrivals = int(result.arrival_ns[-1] - result.arrival_ns[0]) if len(result.arrival_ns) else 0
    if result.span_ns > 1.2 * arrivals > 0:
        console().print(
            f"note: more comes in than one machine computes: the last first token is"
            f" {result.span_ns / arrivals:.1f} times as late as the last arrival, and times to the"
            " first token are mostly waiting; compare computing and stalls instead"
        )
