"""Whether the mask over several sequences packed into one says what the trace will say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtrace.writer import LayerSpec
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.masks import seen_keys

if TYPE_CHECKING:
    from kvtrace_recorder.session.step import ActiveStep
    from kvtrace_recorder.taps.call import Call


def check_packed_mask(step: ActiveStep, call: Call, spec: LayerSpec) -> None:
    """Compare how many keys the last token of each sequence sees with its position.

    Decode steps are not looked at: the same code makes their masks. Kernels without a mask are
    given the lengths of the sequences instead.

    Raises
    ------
    UnrecordableError
        Where a token sees another number of keys, or the mask adds a bias.
    """
    mask, sequences = call.mask, step.record.sequences
    if step.record.phase == "decode" or not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return
    if not sequences:
        return
    seen_before = (id(mask), spec.attention_kind, spec.sliding_window)
    if seen_before in step.checked:
        return
    step.checked.add(seen_before)
    tokens = np.flatnonzero(step.real[0])
    rows = tokens[np.cumsum([s.count for s in sequences]) - 1]
    expected = np.array([s.position + s.count for s in sequences])
    if spec.sliding_window is not None:
        expected = np.minimum(expected, spec.sliding_window)
    found = seen_keys(mask[0, 0, torch.as_tensor(rows).to(mask.device)]).sum(axis=1)
    if not np.array_equal(found, expected):
        raise UnrecordableError(
            f"the mask of layer {spec.layer} is not that of {spec.attention_kind} attention over"
            " each of the packed sequences"
        )
