"""Recording real inference into a trace.

>>> import kvtrace_recorder
>>> with kvtrace_recorder.record(model, "run.kvtrace"):  # doctest: +SKIP
...     model.generate(**inputs)

Importing this package imports neither torch nor transformers, and patches nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtrace_recorder.session.recording import Recording, record
    from kvtrace_recorder.trainer import TraceCallback

__all__ = ["Recording", "TraceCallback", "record"]

_HOMES = {
    "Recording": "kvtrace_recorder.session.recording",
    "TraceCallback": "kvtrace_recorder.trainer",
    "record": "kvtrace_recorder.session.recording",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: every Python process under `kvtrace record` imports us first."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
