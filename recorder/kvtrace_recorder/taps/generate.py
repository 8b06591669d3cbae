"""Which model generates: it calls its encoder by itself, before it is called as a whole."""

from __future__ import annotations

import functools
from typing import Any

from transformers.generation import GenerationMixin

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps.patch import Patch

NAME = "generate"


def patches(session: Session) -> list[Patch]:
    """The patch of this tap: `generate` of every model that can."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            session.guard.run(NAME, session.halves.learn, self)
            return original(self, *args, **kwargs)

        return generate

    return [Patch(GenerationMixin, "generate", make)]
