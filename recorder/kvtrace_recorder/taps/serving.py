"""Which API request a `generate` of `transformers serve` answers.

Under continuous batching the manager's own ids are the API's; see the paged cache tap for those.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from kvtrace_recorder.session.api_request import api_request
from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps.patch import Patch, PatchesAfterImport

NAME = "serving"


def patches(session: Session) -> list[PatchesAfterImport]:
    """The patches of this tap, once the server's modules are imported, which may be never."""
    return [PatchesAfterImport("transformers.cli.serving.utils", lambda: _patches(session))]


def _patches(session: Session) -> list[Patch]:
    return session.guard.run(NAME, _make_patches, session) or []


def _make_patches(session: Session) -> list[Patch]:
    from transformers.cli.serving.utils import GenerateManager, InferenceThread

    return [
        Patch(GenerateManager, "generate_streaming", functools.partial(_streaming, session)),
        Patch(GenerateManager, "generate_non_streaming", functools.partial(_waiting, session)),
        Patch(InferenceThread, "submit", _carried),
        Patch(InferenceThread, "async_submit", _carried),
    ]


def _streaming(session: Session, original: Any) -> Any:
    @functools.wraps(original)
    def generate_streaming(*args: Any, **kwargs: Any) -> Any:
        before = api_request.set(session.guard.run(NAME, _request_id, original, args, kwargs))
        try:
            return original(*args, **kwargs)
        finally:
            api_request.reset(before)

    return generate_streaming


def _waiting(session: Session, original: Any) -> Any:
    @functools.wraps(original)
    async def generate_non_streaming(*args: Any, **kwargs: Any) -> Any:
        before = api_request.set(session.guard.run(NAME, _request_id, original, args, kwargs))
        try:
            return await original(*args, **kwargs)
        finally:
            api_request.reset(before)

    return generate_non_streaming


def _request_id(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return str(inspect.signature(method).bind(*args, **kwargs).arguments["request_id"])


def _carried(original: Any) -> Any:
    """Take the request's id along into the thread that generates."""

    @functools.wraps(original)
    def submit(self: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        request = api_request.get()
        if request is None:
            return original(self, fn, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            before = api_request.set(request)
            try:
                return fn(*args, **kwargs)
            finally:
                api_request.reset(before)

        return original(self, run, *args, **kwargs)

    return submit
