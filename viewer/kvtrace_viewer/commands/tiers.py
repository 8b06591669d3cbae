"""Serve a workload's blocks from memory tiers: HBM, DRAM, NVMe, remote.

Which tier serves how much, what crosses each link, and what it does to the time to the first token.
Prompts are served one after another. With --replay, the tokens of a recorded run: what the replay
kept lies in the first tier, what it evicted in the second, and decode steps fetch what they need.
`kvtrace tiers calibrate` measures this machine instead, and prints a file for --tiers. Results are
kept in the trace, tables tier_*.

Examples: kvtrace tiers conversation.kvtrace --tiers h100 --capacity DRAM=256GB --mode write-through
          kvtrace tiers run.kvtrace --tiers h100 --replay h2o-25pct-step
          kvtrace tiers calibrate > mine.toml
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import kvtrace
from kvtrace.console import progress
from kvtrace.trace import Trace
from kvtrace_viewer.commands.tiers_given import COMPUTE, given_hardware, given_model, given_options
from kvtrace_viewer.commands.tiers_shown import show_blocks, show_tokens
from kvtrace_viewer.tiers.options import LOADS, MODES
from kvtrace_viewer.tiers.order import ORDERS


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
        "--max-batch",
        type=int,
        default=0,
        metavar="N",
        help="decode too, so many requests at once (default: 0, prompts alone)",
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
    parser.add_argument(
        "--replay",
        metavar="ID",
        help="place the tokens of a recorded run by this stored replay (kvtrace info lists them)",
    )
    model = parser.add_argument_group("the model (default: the recorded one, else Llama-3-8B)")
    model.add_argument(
        "--model",
        metavar="NAME|PATH|TRACE",
        help="another model: a known name, a config.json, a model's directory, a trace",
    )
    default, *_ = COMPUTE
    model.add_argument(
        "--compute",
        choices=list(COMPUTE),
        default=default,
        help="; ".join(f"{name}: {text}" for name, text in COMPUTE.items())
        + f" (default: {default})",
    )
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
    from kvtrace_viewer.tiers.calibrate import calibrate

    if args.trace == "calibrate":
        print(calibrate(args.folder))
        return 0
    trace = kvtrace.open(args.trace)
    if args.replay is not None:
        return _tokens(trace, args)
    return _blocks(trace, args)


def _blocks(trace: Trace, args: argparse.Namespace) -> int:
    from kvtrace_viewer.blocks import read_stream
    from kvtrace_viewer.tiers import replay_tiers
    from kvtrace_viewer.tiers.recorded import recorded_times
    from kvtrace_viewer.tiers.storage import store_blocks

    model = given_model(trace, args)
    result = replay_tiers(read_stream(trace), given_hardware(args), model, given_options(args))
    times = recorded_times(trace)
    name = store_blocks(trace, result, model.name, times)
    if args.json:
        told = {"id": name, "model": model.name, **result.to_json(), "recorded": times.to_json()}
        print(json.dumps(told, indent=1))
    else:
        show_blocks(name, model, result, times)
    return 0


def _tokens(trace: Trace, args: argparse.Namespace) -> int:
    from kvtrace_viewer.tiers.storage import store_tokens
    from kvtrace_viewer.tiers.tokens import place_tokens

    with progress("placing tokens") as tell:
        result = place_tokens(
            trace, args.replay, given_hardware(args), given_options(args), progress=tell
        )
    name = store_tokens(trace, result)
    if args.json:
        print(json.dumps({"id": name, **result.to_json()}, indent=1))
    else:
        show_tokens(name, result)
    return 0
