"""Record the bundled model for real, replay the trace, open the viewer.

The table that replay prints comes first; the viewer then runs until it is stopped.

Replaces the demo trace of an earlier run.

Example: kvtrace demo --out traces
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import kvtrace
import kvtrace.cli
from kvtrace.commands.info import describe
from kvtrace_recorder.commands.options import add_kept, kept
from kvtrace_recorder.commands.summary import quiet, summary

POLICIES = ("full", "sliding_window", "streaming_llm", "lru", "h2o", "oracle")
BUDGET = "25%"
NEW_TOKENS = 200
SEED = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--out", metavar="DIR", default="traces", help="folder for demo.kvtrace (default: traces)"
    )
    add_kept(parser)
    parser.add_argument("--no-view", action="store_true", help="stop after the table")
    parser.add_argument("--host", default="127.0.0.1", help="of the viewer (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8050, help="of the viewer (default: 8050)")


def run(args: argparse.Namespace) -> int:
    """Record, replay, view."""
    trace = Path(args.out) / "demo.kvtrace"
    _record(trace, kept(args))
    print(summary(trace), file=sys.stderr)
    status = _replay(trace)
    if status or args.no_view:
        return status
    return kvtrace.cli.main(["view", args.out, "--host", args.host, "--port", str(args.port)])


def _replay(trace: Path) -> int:
    """Replay the policies that can be replayed on what was kept."""
    able = {
        row["policy"]: row["replay"] != "no" for row in describe(kvtrace.open(trace))["replayable"]
    }
    chosen = [word for name in POLICIES if able.get(name, True) for word in ("--policy", name)]
    left = [name for name in POLICIES if not able.get(name, True)]
    if left:
        print(
            f"kvtrace: not replayed: {', '.join(left)}; see kvtrace info {trace}", file=sys.stderr
        )
    if not chosen:
        return 0
    options = ["--budget", BUDGET, "--when", "step"]
    return kvtrace.cli.main(["replay", str(trace), *chosen, *options])


def _record(path: Path, options: dict[str, Any]) -> None:
    import torch

    from kvtrace_recorder import demo
    from kvtrace_recorder.session.recording import record

    quiet()
    print("kvtrace: recording the bundled model ...", file=sys.stderr)
    model, tokenizer = demo.load()
    batch = tokenizer(demo.PROMPT, return_tensors="pt")
    torch.manual_seed(SEED)
    with record(
        model,
        path,
        **options,
        tokenizer=tokenizer,
        force=True,
        on_full="wait",
        command=["kvtrace", "demo"],
    ):
        model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
        )
