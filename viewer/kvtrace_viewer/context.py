"""What the pages and routes of one application share."""

from __future__ import annotations

from dataclasses import dataclass

from kvtrace.bytes_cache import BytesCache
from kvtrace.marks import Mark, find_marks
from kvtrace.trace import Trace
from kvtrace_viewer.derived.identity import identity
from kvtrace_viewer.derived.source import LayerCache
from kvtrace_viewer.jobs import ReplayJobs
from kvtrace_viewer.library import TraceLibrary

TILE_CACHE_BYTES = 64 * 2**20
MARK_CACHE_BYTES = 16 * 2**20
_MARK_BYTES = 100


@dataclass(frozen=True)
class Context:
    """The traces, and what was computed from them lately.

    Attributes
    ----------
    library
        The traces.
    layers
        Layers read lately.
    tiles
        Tiles and thumbnails computed lately, as bytes.
    marks
        Sinks and heavy hitters of heads looked at lately.
    jobs
        Replays started from the browser.
    """

    library: TraceLibrary
    layers: LayerCache
    tiles: BytesCache[bytes]
    marks: BytesCache[list[Mark]]
    jobs: ReplayJobs

    @classmethod
    def of(cls, library: TraceLibrary) -> Context:
        """Make the context of a fresh application."""
        return cls(
            library=library,
            layers=LayerCache(),
            tiles=BytesCache(TILE_CACHE_BYTES, len),
            marks=BytesCache(MARK_CACHE_BYTES, lambda marks: _MARK_BYTES * (1 + len(marks))),
            jobs=ReplayJobs(),
        )

    def head_marks(self, trace: Trace, request: int, layer: int, head: int) -> list[Mark]:
        """Sinks and heavy hitters of a query head, computed once; none in cross attention.

        Both are about keys of one sequence, and how much later its queries come.
        """
        if any(spec.is_cross and spec.layer == layer for spec in trace.layers_of(request)):
            return []
        key = (identity(trace), request, layer, head)
        return self.marks.get(
            key, lambda: find_marks(self.layers.head_map(trace, request, layer, head))
        )
