"""Cross attention: queries on the decoder's rows, keys and values on the encoder's."""

from __future__ import annotations

import numpy as np
import torch

from kvtrace.writer import LayerSpec
from kvtrace_recorder.session.encoders import EncoderRun
from kvtrace_recorder.session.keeping import Keeper
from kvtrace_recorder.session.step import ActiveStep, Hold, Taken
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.keep import kinds_of
from kvtrace_recorder.taps.masks import is_check_due, seen_keys


def take_cross(step: ActiveStep, call: Call, spec: LayerSpec, keeper: Keeper) -> Taken:
    """Take a cross-attention layer's queries; where its encoder's rows wait, their k and v too.

    Raises
    ------
    UnrecordableError
        Where it is not known which tokens the keys are.
    """
    run = step.entry.encoder
    if run is None:
        raise UnrecordableError(f"layer {spec.layer} reads an encoder that was not recorded")
    rows = [run.requests.index(state.encoder) for state in step.entry.requests]
    if call.k.shape[0] != len(rows) or call.k.shape[2] != run.real.shape[1]:
        raise UnrecordableError(
            f"layer {spec.layer} was given keys of shape {tuple(call.k.shape)} of"
            f" {run.real.shape[1]} tokens of an encoder"
        )
    _check_mask(step, call, spec, run, rows)
    kinds = kinds_of(step, keeper, spec)
    q = call.q if "q" in kinds else None
    found = Taken(spec, q, None, None, 0, Hold.FRESH, None, kinds & {"q"})
    if run.step is None:
        return found
    if missing := set(range(len(run.requests))) - set(rows):
        raise UnrecordableError(f"no decoder read rows {sorted(missing)} of the encoder's batch")
    # Beams read copies of one row.
    first = torch.tensor([rows.index(row) for row in range(len(run.requests))])
    k, v = (x.index_select(0, first.to(x.device)) for x in (call.k, call.v))
    run.keys.append(Taken(spec, None, k, v, 0, Hold.FRESH, None, kinds - {"q"}))
    return found


def _check_mask(
    step: ActiveStep, call: Call, spec: LayerSpec, run: EncoderRun, rows: list[int]
) -> None:
    """Compare the mask with the assumption that every token sees all of the encoder's."""
    if not is_check_due(step):
        return
    mask, real = call.mask, run.real[rows]
    if mask is None:
        seen = np.ones_like(real)
    elif isinstance(mask, torch.Tensor) and mask.ndim == 4:
        seen = np.broadcast_to(seen_keys(mask[:, 0, -1]), real.shape)
    else:
        raise UnrecordableError(f"layer {spec.layer} has a mask of unknown form")
    if not np.array_equal(seen, real):
        raise UnrecordableError(f"layer {spec.layer} does not read all tokens of its encoder")
