"""Traces from outside data: one format a file, listed here."""

from __future__ import annotations

#: Format name: the module whose `import_file` reads it.
FORMATS = {
    "qkv-npz": "kvtrace_recorder.importers.qkv_npz",
}
