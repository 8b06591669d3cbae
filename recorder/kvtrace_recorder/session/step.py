"""A forward pass while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvtrace_recorder.messages import StepRecord
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.requests import Bools, CacheEntry


@dataclass
class ActiveStep:
    """What the taps share between the begin and the end of a step.

    Attributes
    ----------
    model : ModelState
        The model that runs.
    record : StepRecord
        What will be written; layers are added as they run.
    batch, length : int
        Shape of the step's tokens, padding included.
    past : int
        Slots filled in the cache before the step.
    cache : transformers Cache or None
        As the model was given it.
    entry : CacheEntry
        The requests.
    real : numpy.ndarray
        [batch, length] of bool: tokens rather than padding.
    keep : torch.Tensor or None
        Indices of the tokens in [batch * length]; None where there is no padding.
    tap_ns : int
        Time spent in taps, which is not the model's.
    checked : set
        Masks already compared in this step.
    """

    model: ModelState
    record: StepRecord
    batch: int
    length: int
    past: int
    cache: Any
    entry: CacheEntry
    real: Bools
    keep: torch.Tensor | None
    tap_ns: int = 0
    checked: set[tuple[Any, ...]] = field(default_factory=set)
