"""Replacing an attribute of a class or a module and putting it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kvtrace_recorder.imports import AfterImport

_ABSENT = object()


class Restorable(Protocol):
    """What a tap changes in a process, and can put back."""

    def apply(self) -> None:
        """Change it."""

    def restore(self) -> None:
        """Put it back; nothing when not applied."""


class Patch:
    """One replaced attribute.

    Parameters
    ----------
    owner : type or module
        Whose attribute it is.
    name : str
        The attribute; may be inherited, which restoring respects.
    make : callable
        Given what the owner has now, returns what stands there while the patch is applied.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._make = owner, name, make
        self._original: Any = _ABSENT
        self._applied = False

    def apply(self) -> None:
        """Replace the attribute."""
        self._original = self._owner.__dict__.get(self._name, _ABSENT)
        setattr(self._owner, self._name, self._make(getattr(self._owner, self._name)))
        self._applied = True

    def restore(self) -> None:
        """Put back what was there; nothing when not applied."""
        if not self._applied:
            return
        self._applied = False
        if self._original is _ABSENT:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._original)


class PatchesAfterImport:
    """Patches of classes whose module is imported later, or never.

    Parameters
    ----------
    module : str
        Full name of the module.
    make : callable
        Returns the patches; called once the module is imported, where that happens.
    """

    def __init__(self, module: str, make: Callable[[], list[Patch]]) -> None:
        self._make = make
        self._waiting = AfterImport(module, self._imported)
        self._patches: list[Patch] = []

    def apply(self) -> None:
        """Begin to wait for the import."""
        self._waiting.install()

    def restore(self) -> None:
        """Stop waiting, and put back what was replaced."""
        self._waiting.remove()
        for patch in reversed(self._patches):
            patch.restore()
        self._patches = []

    def _imported(self) -> None:
        for patch in self._make():
            self._patches.append(patch)
            patch.apply()
