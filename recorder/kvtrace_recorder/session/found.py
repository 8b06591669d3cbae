"""Models that a program runs and that are none of transformers': found by what they do.

Nothing says that a module is a model. One is taken for it when the program calls it outside all
other modules, and something attends before it returns: so of a model its blocks are part, and
losses, encoders of positions and what else a script calls are none. A script that calls blocks one
by one has as many models as blocks.

Where the first model to run is transformers', or is inside what the program calls, only such are
recorded: what runs beside them are their helpers, and looking at each call of every module would
cost the model a percent.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvtrace_recorder.messages import Message
from kvtrace_recorder.session.models import has_transformers

if TYPE_CHECKING:
    from kvtrace_recorder.session.step import ActiveStep
    from kvtrace_recorder.taps.patch import Patch


class FoundModels:
    """The plain models of a recording, as far as they have been found.

    Parameters
    ----------
    put : callable
        Takes what is to be written.
    """

    def __init__(self, put: Callable[[Message], None]) -> None:
        self._put = put
        self._lock = threading.RLock()
        #: By module that was called: whether it holds no model of transformers'.
        self._is_plain: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._announced: set[int] = set()
        #: What sees the calls of all modules.
        self.patch: Patch | None = None

    def may_attend(self, module: Any) -> bool:
        """Whether a module that is called outside all others may turn out to be a model."""
        if not module._parameters and not module._modules:
            # A loss, or an activation.
            return False
        found = self._is_plain.get(module)
        if found is None:
            found = self._is_plain[module] = not has_transformers(module)
        return found

    def attended(self, step: ActiveStep) -> bool:
        """Whether a step of a plain model that has ended is one; its model is then announced."""
        model = step.model
        if not model.is_plain:
            return True
        if not step.batch and step.record.fault is None:
            return False
        with self._lock:
            if model.info.key not in self._announced:
                self._announced.add(model.info.key)
                self._put(model.info)
                name = model.info.columns["architecture"]
                print(
                    f"kvtrace: recording {name}, a plain PyTorch model: each call of it is a step,"
                    " each row of its batch a request",
                    file=sys.stderr,
                )
        return True

    def give_up(self) -> None:
        """A model of transformers' runs: look for no others, where none was found before."""
        with self._lock:
            if self.patch is not None and not self._announced:
                self.patch.restore()
                self.patch = None
