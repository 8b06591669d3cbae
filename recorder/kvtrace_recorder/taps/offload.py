"""Where the layers of a cache lie: an offloaded cache moves them off the GPU and back."""

from __future__ import annotations

import functools
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps.patch import Patch

NAME = "offload"
#: Methods that move a layer, and the event's name.
MOVES = {"offload": "offload", "prefetch": "restore"}


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: the methods of a cache's layers that move them."""
    return [Patch(CacheLayerMixin, name, _maker(session, event)) for name, event in MOVES.items()]


def _maker(session: Session, event: str) -> Any:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = getattr(self.keys, "device", None)
            result = original(self, *args, **kwargs)
            if getattr(self.keys, "device", None) != before:
                session.guard.run(NAME, session.changes.layer_moved, self, event, session.current)
            return result

        return moved

    return make
