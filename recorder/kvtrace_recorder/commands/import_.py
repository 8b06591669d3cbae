"""Make a trace from outside data.

Formats:
  qkv-npz   q{l} [q_head, token, head_dim], k{l}, v{l} [kv_head, token, head_dim] per layer l from
            0, after rotary embedding, and ids [token]; optional q_prerope{l}, wo [layer, hidden,
            q_head*head_dim] and prompt_tokens (default: all). Kept in the file's own type.

Example: kvtrace import qkv-npz run.npz --out run.kvtrace
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from kvtrace.writer import check_new_path
from kvtrace_recorder.commands.options import add_force
from kvtrace_recorder.commands.summary import summary
from kvtrace_recorder.importers import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("format", choices=tuple(FORMATS), help="what the file holds")
    parser.add_argument("file", metavar="FILE", help="the file to read")
    parser.add_argument("--out", metavar="T", required=True, help="the trace to make")
    add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Import."""
    out = Path(args.out)
    check_new_path(out, force=args.force)
    importer = importlib.import_module(FORMATS[args.format])
    command = ["kvtrace", "import", args.format, args.file]
    importer.import_file(Path(args.file), out, force=args.force, command=command)
    print(summary(out), file=sys.stderr)
    return 0
