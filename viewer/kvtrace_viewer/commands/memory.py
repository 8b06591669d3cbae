"""How much memory a model's KV cache takes at any context and batch, and what fits where.

MODEL is one of the known names, a model's directory or config.json, or a trace.

Examples: kvtrace memory llama-3-8b --context 32k --batch 8
          kvtrace memory traces/demo.kvtrace --dtype fp8
"""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvtrace.console import console, human_bytes
from kvtrace.errors import InputError

if TYPE_CHECKING:
    from kvtrace_viewer.memory import ModelMemory

CONTEXTS = [512 << n for n in range(12)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from kvtrace_viewer.memory.model import DTYPES, shipped

    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(shipped())}, or a path")
    parser.add_argument("--context", default="8k", metavar="N", help="tokens (default: 8k)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument(
        "--dtype", metavar="TYPE", help=f"of the cache: {', '.join(DTYPES)} (default: the model's)"
    )
    parser.add_argument(
        "--parameters", type=float, metavar="N", help="such as 8e9, where the model does not say"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Compute, print."""
    from kvtrace_viewer.memory import read_model

    context = _tokens(args.context)
    if args.batch < 1:
        raise InputError(f"batch is {args.batch}; at least 1 was expected; write --batch 8")
    parameters = int(args.parameters) if args.parameters else None
    model = read_model(args.model, args.dtype, parameters)
    found = _numbers(model, context, args.batch)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    return 0


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if match is None or int(match[1]) < 1:
        raise InputError(
            f"context is {text!r}; tokens of at least 1 were expected; write --context 32k"
        )
    return int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2]]


def _numbers(model: ModelMemory, context: int, batch: int) -> dict[str, Any]:
    from kvtrace_viewer.tiers.hardware import read_hardware
    from kvtrace_viewer.tiers.hardware import shipped as machines
    from kvtrace_viewer.tiers.run import USABLE

    fits = []
    for name in machines():
        tier = read_hardware(name).tiers[0]
        room = int(tier.capacity * USABLE) - (model.weights or 0)
        fits.append(
            {
                "machine": name,
                "memory": tier.capacity,
                "room": room,
                "largest_context": model.largest_context(room, batch) if room > 0 else 0,
                "largest_batch": model.largest_batch(room, context),
            }
        )
    return {
        "model": model.name,
        "dtype": model.dtype,
        "layers": len(model.layers),
        "sliding_layers": sum(layer.window is not None for layer in model.layers),
        "bytes_per_token": model.bytes_per_token,
        "context": context,
        "batch": batch,
        "cache_bytes": model.cache_bytes(context, batch),
        "parameters": model.parameters,
        "weight_bytes": model.weights,
        "scaling": [
            {"context": length, "cache_bytes": model.cache_bytes(length, batch)}
            for length in CONTEXTS
        ],
        "fits": fits,
    }


def _show(found: dict[str, Any]) -> None:
    out = console()
    sliding = f", {found['sliding_layers']} of them sliding" if found["sliding_layers"] else ""
    out.print(
        f"{found['model']}: {human_bytes(found['bytes_per_token'])} a token"
        f" ({found['layers']} layers{sliding}, {found['dtype']})",
        markup=False,
    )
    cache, weights = found["cache_bytes"], found["weight_bytes"]
    line = f"{found['batch']} x {found['context']:,} tokens: {human_bytes(cache)} of cache"
    if weights is not None:
        line += f", {human_bytes(weights)} of weights ({cache / (cache + weights):.0%} is cache)"
    out.print(line)
    table = Table("context", title=f"cache of {found['batch']} sequences", title_justify="left")
    table.add_column("bytes", justify="right")
    for row in found["scaling"]:
        table.add_row(f"{row['context']:,}", human_bytes(row["cache_bytes"]))
    out.print(table)
    table = Table("machine")
    for name in ("memory", "room for cache", "largest context", f"batch at {found['context']:,}"):
        table.add_column(name, justify="right")
    for row in found["fits"]:
        longest = "any" if row["largest_context"] is None else f"{row['largest_context']:,}"
        room = human_bytes(row["room"]) if row["room"] > 0 else "none"
        sizes = (human_bytes(row["memory"]), room, longest, f"{row['largest_batch']:,}")
        table.add_row(row["machine"], *sizes)
    out.print(table)
    if weights is None:
        out.print("note: the number of parameters is not known: give --parameters")
    out.print("90% of a machine's memory serve weights and cache; activations are left out.")
