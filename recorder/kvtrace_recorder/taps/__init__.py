"""Taps on a running model: one tap a file, listed here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtrace_recorder.session.session import Session
    from kvtrace_recorder.taps.patch import Restorable


def patches(session: Session) -> list[Restorable]:
    """The patches of all taps, in the order to apply them."""
    # Imported here: the taps need transformers, and nothing is imported before the user does.
    from kvtrace_recorder.taps import (
        attention,
        cache,
        compiled,
        generate,
        model_forward,
        multihead,
        offload,
        optimizer,
        paged_cache,
        sdpa,
        serving,
        softmax,
    )

    return [
        *attention.patches(session),
        *compiled.patches(session),
        *sdpa.patches(session),
        *softmax.patches(session),
        *multihead.patches(session),
        *cache.patches(session),
        *offload.patches(session),
        *paged_cache.patches(session),
        *generate.patches(session),
        *serving.patches(session),
        *optimizer.patches(session),
        *model_forward.patches(session),
    ]
