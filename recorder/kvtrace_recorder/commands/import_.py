"""Make a trace from outside data.

`kvtrace import FORMAT --help` tells what a format holds and which options it takes.

Examples: kvtrace import qkv-npz run.npz --out run.kvtrace
          kvtrace import kv-events tcp://localhost:5557 --out served.kvtrace
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from kvtrace.ranks import check_new_path
from kvtrace_recorder.commands.options import add_force
from kvtrace_recorder.commands.summary import summary
from kvtrace_recorder.importers import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a subcommand for every format."""
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    for name, module in FORMATS.items():
        importer = importlib.import_module(module)
        text = (importer.__doc__ or "").strip()
        one = formats.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        importer.add_arguments(one)
        one.add_argument("--out", metavar="T", required=True, help="the trace to make")
        add_force(one)


def run(args: argparse.Namespace) -> int:
    """Import."""
    out = Path(args.out)
    check_new_path(out, force=args.force)
    importer = importlib.import_module(FORMATS[args.format])
    importer.run_import(args, out, ["kvtrace", "import", args.format, args.source])
    print(summary(out), file=sys.stderr)
    return 0
