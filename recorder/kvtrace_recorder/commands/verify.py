"""Run the real model under a replay's kept sets, and measure what that changed.

The recorded tokens go through the model twice: with its full cache, and with every key hidden
from the moment the replay evicted it, per layer and KV head (or, where each query chooses
what it reads, from those that do not read it). What comes out (KL divergence, perplexity, agreement
of the likeliest token) is kept beside what the replay predicted. The policy is also run live, on
the evicting run's own queries, keys and values, and both ways generate freely.

Example: kvtrace verify traces/demo.kvtrace --replay h2o-25pct-step
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

import kvtrace
from kvtrace.console import console, progress
from kvtrace.errors import InputError

if TYPE_CHECKING:
    from kvtrace_recorder.certificate import Certificate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    parser.add_argument(
        "--replay",
        metavar="ID",
        action="append",
        required=True,
        help="a stored replay (kvtrace info names them); may be given several times",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a directory, a hub name, or demo (default: where the recorded model was)",
    )
    parser.add_argument(
        "--generate",
        metavar="N",
        type=int,
        default=64,
        help="tokens to generate freely both ways, at most as many as were recorded (default: 64)",
    )
    parser.add_argument(
        "--live-passes",
        metavar="N",
        type=int,
        default=8,
        help="passes at most to run the policy live, each one run and one replay; 0: not"
        " (default: 8)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Certify, keep, print."""
    if args.generate < 0 or args.live_passes < 0:
        raise InputError(
            f"--generate {args.generate} and --live-passes {args.live_passes}; numbers from 0 were"
            " expected"
        )
    trace = kvtrace.open(args.trace)
    for name in args.replay:
        trace.replay(name)
    from kvtrace_recorder.certificate.certify import Options, certify
    from kvtrace_recorder.commands.generate import load_model

    model, tokenizer = load_model(args.model or recorded_model(trace), _kernel(trace))
    with progress("verifying") as tell:
        found = certify(
            trace,
            args.replay,
            model,
            tokenizer,
            Options(args.live_passes, args.generate),
            tell,
        )
    predicted = {row["replay"]: row for row in trace.replays().to_pylist()}
    if args.json:
        print(json.dumps([_as_json(one, predicted[one.replay]) for one in found], indent=1))
    else:
        for one in found:
            _show(one, predicted[one.replay])
    return 0


def recorded_model(trace: kvtrace.Trace) -> str:
    """Where the model of a trace was loaded from.

    Raises
    ------
    InputError
        Where the trace does not say, or it is no longer there.
    """
    models = trace.table("models").to_pylist()
    config = json.loads(models[0]["config"] or "{}") if models else {}
    name = str(config.get("_name_or_path") or "")
    if name and Path(name).is_dir():
        return name
    if Path(name).name == "kvtrace-demo":
        return "demo"
    if not name or Path(name).is_absolute():
        raise InputError(
            f"the model of {trace.path} was at {name or 'no path that it recorded'}; its directory"
            " was expected; give it with --model DIR"
        )
    return name


def _kernel(trace: kvtrace.Trace) -> str | None:
    """The attention that was recorded, where a mask can be given to it."""
    found = trace.table("models")["attn_implementation"].to_pylist()
    return found[0] if found and found[0] in ("eager", "sdpa") else None


def _as_json(one: Certificate, predicted: dict[str, Any]) -> dict[str, Any]:
    names = ("policy", "budget", "decide_when", "exactness", "retained_mass", "output_error")
    return one.to_json() | {"predicted": {name: predicted[name] for name in names}}


def _show(one: Certificate, predicted: dict[str, Any]) -> None:
    out = console()
    table = Table(
        "",
        "value",
        title=f"{one.replay}, request {one.request}: {one.rows} rows",
        title_justify="left",
    )
    for name, value in _lines(one, predicted):
        table.add_row(name, value)
    out.print(table)


def _lines(one: Certificate, predicted: dict[str, Any]) -> list[tuple[str, str]]:
    mass, error = predicted["retained_mass"], predicted["output_error"]
    lines = [
        ("predicted lost mass", "-" if mass is None else f"{max(1 - mass, 0.0):.4f}"),
        ("predicted output error", "-" if error is None else f"{error:.4f}"),
        ("KL mean, p95, largest", f"{one.kl_mean:.4g}, {one.kl_p95:.4g}, {one.kl_max:.4g} nats"),
        ("perplexity", f"{_number(one.perplexity_full)} -> {_number(one.perplexity_evicted)}"),
        ("top-1 agreement", f"{one.agreement:.1%}"),
        ("first diverging row", "none" if one.diverges_at is None else str(one.diverges_at)),
        ("keys off the recorded", f"{one.key_error:.1e}"),
    ]
    if one.generation is not None:
        at = one.generation.diverges_at
        parted = "no token differs" if at is None else f"token {at} differs first"
        lines.append(("generated freely", f"{one.generation.tokens} tokens: {parted}"))
    if one.live is None:
        return [*lines, ("live", f"not run: {one.live_reason}")]
    settled = "settled" if one.live.settled else "not settled"
    return [
        *lines,
        ("live", f"{settled} in pass {one.live.passes}, KL mean {one.live.kl_mean:.4g}"),
        ("live kept sets, Jaccard", f"{one.live.jaccard:.4f} over {len(one.live.events['layer'])}"),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
