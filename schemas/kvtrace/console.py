"""What the verbs print with: tables on standard output, progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def console() -> Console:
    """Console on standard output; wide enough for a table when it is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


@contextmanager
def progress(title: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error, silent where that is no terminal.

    Yields
    ------
    callable
        Takes the share done, 0 to 1.
    """
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def human_bytes(number: float) -> str:
    """Bytes as a person reads them: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
