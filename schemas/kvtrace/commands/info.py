"""Show what a trace holds and which policies it can replay.

Example: kvtrace info traces/demo.kvtrace
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from rich.table import Table

import kvtrace
from kvtrace.cached import model_kinds
from kvtrace.console import console, human_bytes
from kvtrace.model import Layer, number_text

#: What is said of a replay that `kvtrace verify` has run the model under.
_CERTIFIED = (
    "replay",
    "request",
    "rows",
    "kl_mean",
    "kl_p95",
    "perplexity_full",
    "perplexity_evicted",
    "agreement",
    "diverges_at",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Print."""
    found = describe(kvtrace.open(args.trace))
    if args.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def describe(trace: kvtrace.Trace) -> dict[str, Any]:
    """Everything `info` says, as plain values."""
    models = trace.table("models").to_pylist()
    runs = trace.table("runs").to_pylist()
    kinds = model_kinds(trace)
    return {
        "path": str(trace.path),
        "format_version": trace.manifest.format_version,
        "status": trace.status,
        "complete": trace.status == "complete",
        "source": trace.manifest.source,
        "command": trace.manifest.command,
        "created_ns": trace.manifest.created_ns,
        "detail": runs[0]["detail"] if runs else None,
        "dtype": runs[0]["dtype"] if runs else None,
        # A model that several ranks ran counts once.
        "models": [
            {key: row[key] for key in row if key != "config"}
            for row in models
            if kinds[row["model"]] == row["model"]
        ],
        "heads": _shard(trace.layers),
        "layers": sum(kinds[layer.model] == layer.model for layer in trace.layers),
        "rows": trace.rows,
        "ranks": _ranks(trace),
        # Those of an imported workload have no tokens, and there may be millions.
        "requests": len(trace.requests()) if trace.rows else trace.table("requests").num_rows,
        "steps": sum(
            trace.store(rank).table("steps").num_rows
            for rank in trace.ranks
            if rank not in trace.shards
        ),
        # A served trace has millions of these: counted, not read.
        **trace.sql(
            "select (select count(*) from kv_events) kv_events,"
            " (select count(distinct block) from kv_events) blocks,"
            " (select count(*) from block_accesses) block_accesses"
        ).to_pylist()[0],
        "bytes": trace.bytes,
        "signals": sorted(trace.signals),
        "kinds": sorted(set(trace.table("array_catalog")["kind"].to_pylist())),
        "queries": trace.queries,
        "selection": trace.selection,
        "verified": trace.table("verifications").to_pylist(),
        "gaps": trace.table("gaps").to_pylist(),
        "replays": trace.replays()["replay"].to_pylist(),
        "certificates": [
            {name: row[name] for name in _CERTIFIED}
            for row in trace.table("certificates").to_pylist()
        ],
        "replayable": _replayable(trace),
    }


def _ranks(trace: kvtrace.Trace) -> list[dict[str, Any]]:
    clocks = trace.clocks()
    parts = {rank: kvtrace.open(trace.path, rank) for rank in trace.ranks}
    return [
        {
            "rank": rank,
            "rows": part.rows,
            "status": part.status,
            "heads": _shard(part.layers),
            "joined_with": trace.shards.get(rank),
            "clock": clocks[rank].basis,
            "clock_uncertainty_ns": clocks[rank].uncertainty_ns,
        }
        for rank, part in parts.items()
    ]


def _shard(layers: Sequence[Layer]) -> str | None:
    """Which KV heads there are, where they are not all of the model's."""
    spec = next((layer for layer in layers if layer.model_kv_heads is not None), None)
    if spec is None:
        return None
    if spec.kv_heads is None:
        which = f"{spec.num_kv_heads}"
        return f"{which} of {spec.model_kv_heads} KV heads of the model, not known which"
    return f"KV heads {number_text(spec.kv_head_numbers)} of the model's {spec.model_kv_heads}"


def _replayable(trace: kvtrace.Trace) -> list[dict[str, Any]]:
    # What a policy needs is known where the policies are: an installed viewer says it here.
    found: list[dict[str, Any]] = []
    for point in entry_points(group="kvtrace.info"):
        try:
            found += point.load()(trace)
        except ModuleNotFoundError:
            continue
    return found


def _show(found: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{found['path']}[/bold]  {found['status']}, {found['source']}")
    for model in found["models"]:
        layers = model["num_layers"]
        known = [
            model["architecture"],
            None if layers is None else f"{layers} layers",
            *(model[column] for column in ("dtype", "attn_implementation", "device")),
        ]
        text = ", ".join(str(part) for part in known if part is not None)
        out.print(f"model     {model['name']} ({text})")
    out.print(
        f"holds     {found['rows']} rows, {found['requests']} requests, {found['steps']} steps,"
        f" {found['layers']} attention layers, {human_bytes(found['bytes'])}"
    )
    if len(found["ranks"]) > 1:
        for rank in found["ranks"]:
            rows = f"{rank['rows']} rows, {rank['status']}"
            if rank["heads"]:
                rows += f", {rank['heads']}"
            if rank["joined_with"] is not None:
                rows += f" for the requests of rank {rank['joined_with']}"
            out.print(f"rank      {rank['rank']}: {rows}; {_clock(rank)}")
    if found["heads"]:
        out.print(
            f"heads     {found['heads']}: the others ran in processes that were not recorded or"
            " cannot be joined; all that is said of heads is of these"
        )
    if found["block_accesses"]:
        out.print(f"workload  {found['block_accesses']:,} block accesses: kvtrace blocks")
    if found["kv_events"]:
        # Caches that are not made of blocks have events too.
        blocks = f" of {found['blocks']:,} blocks" if found["blocks"] else ""
        out.print(f"events    {found['kv_events']:,} KV events{blocks}")
    if found["layers"]:
        stored = f" in {found['dtype']}: {_precision(found)}" if "k" in found["kinds"] else ""
        out.print(f"detail    {found['detail']}{stored}")
        out.print(f"queries   {_selected(found)}")
    if found["verified"]:
        out.print(f"verified  {_verified(found['verified'])}")
    out.print(f"replays   {', '.join(found['replays']) or 'none yet: kvtrace replay'}")
    for row in found["certificates"]:
        out.print(_certificate(row), markup=False)
    for line in _gaps(found["gaps"]) or ["gaps      none"]:
        out.print(line)
    if not found["layers"]:
        out.print("no policy can be replayed: no attention layer was recorded")
        return
    if not found["replayable"]:
        out.print("which policies it can replay: pip install 'kvtrace[viewer]'", markup=False)
        return
    table = Table("replays", "exactness", "policies", "why", title="replayable")
    table.title_justify = "left"
    # By reason: most policies share one of a few, and `kvtrace replay --list` has each alone.
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in found["replayable"]:
        how = (row["replay"], row["exactness"], row["reason"])
        alike.setdefault(how, []).append(row["policy"])
    for (replay, exactness, reason), policies in alike.items():
        table.add_row(replay, exactness, ", ".join(policies), reason)
    out.print(table)


def _clock(rank: dict[str, Any]) -> str:
    if rank["clock"] == "reference":
        return "its clock is the trace's"
    error = rank["clock_uncertainty_ns"]
    known = "nobody knows how far off" if error is None else f"to within {error / 1e6:.3g} ms"
    shared = "the host's monotonic clock" if rank["clock"] == "monotonic" else "wall clocks alone"
    return f"times aligned by {shared}, {known}"


def _selected(found: dict[str, Any]) -> str:
    """Which queries there are, and what else was asked for."""
    asked = found["selection"]
    numbers = [
        f"{name} {number_text(asked[name])} only"
        for name in ("layers", "heads")
        if asked.get(name) is not None
    ]
    limit = asked.get("max_bytes")
    limits = [] if limit is None else [f"at most {human_bytes(limit)} before compression"]
    prompts = f"of the prompts {found['queries']}, of every decoded token"
    return "; ".join([prompts if "q" in found["kinds"] else "none", *numbers, *limits])


def _verified(rows: list[dict[str, Any]]) -> str:
    worst = max(rows, key=lambda row: float(row["max_error"]))
    return (
        f"attention outputs of {sum(row['rows'] for row in rows)} rows recomputed from the trace:"
        f" largest relative error {worst['max_error']:.1e} (layer {worst['layer']})"
    )


def _certificate(row: dict[str, Any]) -> str:
    before, after = row["perplexity_full"], row["perplexity_evicted"]
    worse = "" if before is None else f", perplexity {before:.4g} -> {after:.4g}"
    return (
        f"certificate {row['replay']}, request {row['request']}: KL mean {row['kl_mean']:.4g}"
        f" (p95 {row['kl_p95']:.4g}) nats{worse}, top-1 agreement {row['agreement']:.1%}"
    )


def _precision(found: dict[str, Any]) -> str:
    kinds = {model["dtype"] for model in found["models"]}
    if found["dtype"] == "float32":
        return "attention agrees with the model's to about 1e-5"
    if kinds <= {"float16", "torch.float16"}:
        return "as the model computed it"
    return "the model's values were rounded, attention agrees to about 2e-3"


def _gaps(rows: list[dict[str, Any]]) -> list[str]:
    """A line a reason, however often it came up."""
    lost = Counter[tuple[str, str]]()
    for row in rows:
        lost[row["what"], row["reason"]] += row["count"]
    return [f"gap       {count} {what}: {reason}" for (what, reason), count in lost.items()]
