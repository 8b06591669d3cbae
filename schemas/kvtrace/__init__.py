"""kvtrace: record what a language model does with its KV cache once, replay everything.

This package is the trace itself: writing, reading, SQL and the `kvtrace` command. The recorder
(`kvtrace_recorder`) and the viewer (`kvtrace_viewer`) meet only here.
"""

from kvtrace.errors import InputError, KvtraceError, QueryError, TraceError
from kvtrace.model import Layer, LayerData, Request
from kvtrace.trace import Trace, list_traces
from kvtrace.trace import open_trace as open
from kvtrace.version import __version__

__all__ = [
    "InputError",
    "KvtraceError",
    "Layer",
    "LayerData",
    "QueryError",
    "Request",
    "Trace",
    "TraceError",
    "__version__",
    "list_traces",
    "open",
]
