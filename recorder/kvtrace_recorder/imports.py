"""Doing something right after a module has been imported by somebody else.

`kvtrace record -- script.py` must not import torch or transformers before the script does: the
script may set environment variables first, or choose its own versions on sys.path.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Modules whose code has run while Python still calls them initialising: those being announced.
_announced: set[str] = set()


class AfterImport(MetaPathFinder):
    """Calls back once a module has finished importing.

    Parameters
    ----------
    name : str
        Full name of the module.
    callback : callable
        Called in the importing thread, right away where the module is already imported.
    """

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self._name = name
        self._callback = callback
        self._searching = False

    def install(self) -> None:
        """Begin to wait."""
        module = sys.modules.get(self._name)
        initializing = getattr(getattr(module, "__spec__", None), "_initializing", False)
        if module is not None and (not initializing or self._name in _announced):
            self._callback()
        else:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Stop waiting; nothing when it is over."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find the module, and wrap its loader."""
        if fullname != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader, self._done)
        return spec

    def _done(self) -> None:
        self.remove()
        _announced.add(self._name)
        try:
            self._callback()
        finally:
            _announced.discard(self._name)


class _Announcing(Loader):
    """A loader that says when it is done; everything else is the real loader's."""

    def __init__(self, loader: Loader, done: Callable[[], None]) -> None:
        self._loader = loader
        self._done = done

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is as if we had never been there.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._done()
