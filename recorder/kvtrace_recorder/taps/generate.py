"""Which model generates, and from how long a prompt.

It calls its encoder by itself, before it is called as a whole; and it may be given its prompt in
chunks, of which the first alone does not say how many come.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.generation import GenerationMixin

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps.patch import Patch

NAME = "generate"


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: `generate` of every model that can, and its prefill."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            session.guard.run(NAME, session.halves.learn, self)
            return original(self, *args, **kwargs)

        return generate

    def make_prefill(original: Any) -> Any:
        @functools.wraps(original)
        def prefill(self: Any, *args: Any, **kwargs: Any) -> Any:
            session.prompts = session.guard.run(NAME, chunked_prompts, *args, **kwargs)
            try:
                return original(self, *args, **kwargs)
            finally:
                session.prompts = None

        return prefill

    found = [Patch(GenerationMixin, "generate", make)]
    # No part of the library's interface: other versions of it prefill elsewhere.
    if hasattr(GenerationMixin, "_prefill"):
        found.append(Patch(GenerationMixin, "_prefill", make_prefill))
    return found


def chunked_prompts(
    input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
) -> list[int] | None:
    """Tokens of each prompt of a batch that is given in chunks; None where it comes at once."""
    if generation_config.prefill_chunk_size is None:
        return None
    mask = model_kwargs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return [int(input_ids.shape[1])] * int(input_ids.shape[0])
    return [int(count) for count in (mask != 0).sum(dim=1).tolist()]
