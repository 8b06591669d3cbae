"""Show attention sinks and heavy hitters as they emerge over a recorded training.

A row for each recorded step: what share of its attention a query pays to the first token (mean
and largest over the heads), how many heads have sinks, and how much heavy hitters receive.

Example: kvtrace emergence traces/training.kvtrace
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import pyarrow as pa
from rich.table import Table

import kvtrace
from kvtrace.console import console

_COLUMNS = ("step", "first token", "largest", "heads with sinks", "heavy hitters", "their share")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory with steps of a training")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON document on standard output: a row for each step, layer and head",
    )


def run(args: argparse.Namespace) -> int:
    """Print."""
    from kvtrace_viewer.derived.emergence import by_training_step

    found = by_training_step(kvtrace.open(args.trace))
    if args.json:
        print(json.dumps(found.to_pylist()))
    else:
        console().print(_over_heads(found))
    return 0


def _over_heads(found: pa.Table) -> Table:
    columns = {name: found[name].to_numpy() for name in found.column_names}
    steps = columns["training_step"]
    table = Table(*_COLUMNS, title="over all heads", title_justify="left")
    for step in np.unique(steps):
        of_step = {name: values[steps == step] for name, values in columns.items()}
        first, sinks = of_step["first_token"], of_step["sinks"]
        table.add_row(
            f"{step:,}",
            f"{first.mean():.4f}",
            f"{first.max():.4f}",
            f"{np.count_nonzero(sinks)}/{len(sinks)}",
            f"{of_step['heavy_hitters'].mean():.1f}",
            f"{of_step['heavy_share'].mean():.4f}",
        )
    return table
