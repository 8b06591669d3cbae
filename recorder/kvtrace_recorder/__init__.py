"""Recording real inference into a trace.

>>> import kvtrace_recorder
>>> with kvtrace_recorder.record(model, "run.kvtrace"):  # doctest: +SKIP
...     model.generate(**inputs)

Importing this package imports neither torch nor transformers, and patches nothing.
"""

from kvtrace_recorder.session.recording import Recording, record

__all__ = ["Recording", "record"]
