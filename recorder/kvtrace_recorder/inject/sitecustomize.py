"""Found by a child's Python because `kvtrace record` put this folder on PYTHONPATH."""

from __future__ import annotations

import sys
from pathlib import Path


def _run_hidden() -> None:
    """Run the sitecustomize that this one hides, where there is one."""
    import importlib

    here = Path(__file__).parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".") != here]
    own = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    if own is not None:
        sys.modules.setdefault("sitecustomize", own)


_run_hidden()
try:
    from kvtrace_recorder.child import start
except ImportError as error:
    print(f"kvtrace: not recorded: {sys.executable} has no kvtrace: {error}", file=sys.stderr)
else:
    start()
