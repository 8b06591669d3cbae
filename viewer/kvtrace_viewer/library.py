"""The traces under one folder: the only place where a name from a URL becomes a path."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import kvtrace
from kvtrace.errors import KvtraceError, TraceError
from kvtrace.trace import Trace

MAX_OPEN_TRACES = 8


@dataclass(frozen=True)
class TraceEntry:
    """One trace of the list: opened, or the reason why it could not be."""

    id: str
    path: Path
    trace: Trace | None
    error: str | None


class TraceLibrary:
    """Lists and opens the traces under a root; ids are paths relative to it.

    An id is looked up in the listing and never joined to a path, so no id reaches a file
    outside the root. Safe to use from several threads.

    Parameters
    ----------
    root
        A folder of traces, or a single trace.
    """

    def __init__(self, root: Path) -> None:
        self.given = root
        self._single = (root / "manifest.json").is_file()
        self.root = (root.parent if self._single else root).resolve()
        self._open: OrderedDict[str, tuple[int, Trace]] = OrderedDict()
        self._lock = threading.RLock()

    def paths(self) -> dict[str, Path]:
        """Trace directories by id, in the order of their names."""
        if self._single:
            found = [self.given.resolve()]
        elif self.root.is_dir():
            # A folder named like a trace is listed even where its manifest is damaged.
            named = [*self.root.glob("*.kvtrace"), *self.root.glob("*/*.kvtrace")]
            found = sorted({*kvtrace.list_traces(self.root), *named})
        else:
            found = []
        inside = {}
        for path in found:
            resolved = path.resolve()
            # A link that leads out of the root is not ours to serve.
            if resolved.is_relative_to(self.root):
                inside[path.absolute().relative_to(self.root).as_posix()] = resolved
        return inside

    def open(self, trace_id: str) -> Trace:
        """Open a trace by id, refreshed when it is still being recorded.

        Raises
        ------
        TraceError
            When no such trace is listed, or it cannot be read.
        """
        path = self.paths().get(trace_id)
        if path is None:
            raise TraceError(
                f"no trace named {trace_id!r} under {self.root}; "
                "expected one of the traces listed; pick one on the runs page"
            )
        with self._lock:
            return self._opened(trace_id, path)

    def _opened(self, trace_id: str, path: Path) -> Trace:
        manifest_ns = (path / "manifest.json").stat().st_mtime_ns
        known_ns, trace = self._open.get(trace_id, (0, None))
        # A changed manifest: --force put another trace in its place.
        if trace is None or known_ns != manifest_ns:
            trace = kvtrace.open(path)
        elif trace.status != "complete":
            trace.refresh()
        self._open[trace_id] = (manifest_ns, trace)
        self._open.move_to_end(trace_id)
        while len(self._open) > MAX_OPEN_TRACES:
            self._open.popitem(last=False)
        return trace

    def entries(self) -> list[TraceEntry]:
        """Every trace, newest first; one that cannot be read comes with its error."""
        entries = []
        for trace_id, path in self.paths().items():
            try:
                entries.append(TraceEntry(trace_id, path, self.open(trace_id), None))
            except (KvtraceError, OSError) as error:
                entries.append(TraceEntry(trace_id, path, None, str(error)))
        return sorted(entries, key=lambda entry: _modified(entry.path), reverse=True)

    def default_id(self) -> str | None:
        """Id of the newest trace that opens, None where there is none."""
        return next((entry.id for entry in self.entries() if entry.trace is not None), None)


def _modified(path: Path) -> float:
    manifest = path / "manifest.json"
    return manifest.stat().st_mtime if manifest.exists() else 0.0
