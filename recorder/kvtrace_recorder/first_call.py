"""Doing something when a program first calls a module of PyTorch, before the call goes on.

A program that never imports transformers says by nothing else that it runs a model. What is needed
to record one takes seconds to import: a process that only imports torch pays none of that.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from kvtrace_recorder.imports import AfterImport


class FirstCall:
    """Calls back when a `torch.nn.Module` that has something in it is first called.

    Parameters
    ----------
    callback : callable
        Called once, in the thread that calls the module, whose call goes on afterwards by whatever
        stands in `nn.Module.__call__` then.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._lock = threading.RLock()
        self._waiting = AfterImport("torch", self._watch)
        self._original: Any = None

    def install(self) -> None:
        """Begin to wait; nothing is imported."""
        self._waiting.install()

    def remove(self) -> None:
        """Stop waiting; nothing when it is over."""
        self._waiting.remove()
        with self._lock:
            original, self._original = self._original, None
            if original is not None:
                from torch import nn

                nn.Module.__call__ = original  # type: ignore[method-assign]

    def _watch(self) -> None:
        import torch
        from torch import nn

        original = nn.Module.__call__

        @functools.wraps(original)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not (module._parameters or module._modules):
                # A loss, or an activation.
                return original(module, *args, **kwargs)
            with self._lock:
                if self._original is not None:
                    self.remove()
                    self._callback()
            return type(module).__call__(module, *args, **kwargs)

        self._original = original
        nn.Module.__call__ = call  # type: ignore[method-assign]
