"""What happens to the KV cache between the steps: crops and reorderings."""

from __future__ import annotations

import functools
from typing import Any

from transformers.cache_utils import Cache

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps.patch import Patch

NAME = "cache"
#: Methods that change what the slots of a cache hold, and the event's name if it is one.
CHANGES = {
    "crop": "crop",
    "reorder_cache": "reorder",
    "batch_repeat_interleave": "reorder",
    "batch_select_indices": "reorder",
    # What follows begins at 0 again, with requests of its own.
    "reset": None,
}


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: the methods of `Cache` that change its slots."""
    return [Patch(Cache, name, _maker(session, name)) for name in CHANGES]


def _maker(session: Session, name: str) -> Any:
    event = CHANGES[name]

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            session.guard.run(NAME, session.changes.before, self)
            result = original(self, *args, **kwargs)
            if event is not None:
                value = args[0] if args else next(iter(kwargs.values()), None)
                session.guard.run(NAME, session.changes.after, self, name, event, value)
            return result

        return changed

    return make
