"""Traces from outside data: one format a file or folder, listed here.

A format is a module with `add_arguments(parser)`, which declares its source and options, and
`run_import(args, out, command)`, which makes the trace; its docstring's first line is its help.
"""

from __future__ import annotations

#: Format name: its module.
FORMATS = {
    "qkv-npz": "kvtrace_recorder.importers.qkv_npz",
    "kv-events": "kvtrace_recorder.importers.kv_events",
    "mooncake": "kvtrace_recorder.importers.workloads.mooncake",
    "weka": "kvtrace_recorder.importers.workloads.weka",
    "lmcache": "kvtrace_recorder.importers.workloads.lmcache",
    "qwen-bailian": "kvtrace_recorder.importers.workloads.qwen_bailian",
}
