"""How far a training is: steps of torch's optimizers."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from kvtrace_recorder.session.session import Session

NAME = "optimizer"


class StepHook:
    """Torch's own hook after every optimizer's step; a `Restorable`.

    Parameters
    ----------
    session : Session
        Told of the steps.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._handle: Any = None

    def apply(self) -> None:
        """Begin to listen."""
        self._handle = register_optimizer_step_post_hook(self._stepped)

    def restore(self) -> None:
        """Stop."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._session.guard.run(NAME, self._session.training.stepped, optimizer)


def patches(session: Session) -> list[StepHook]:
    """The hook of this tap."""
    return [StepHook(session)]
