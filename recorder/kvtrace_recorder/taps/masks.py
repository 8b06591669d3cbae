"""Padding from a model's mask, and whether the mask says what the trace will say."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace.writer import LayerSpec
from kvtrace_recorder.taps.guard import UnrecordableError

if TYPE_CHECKING:
    from kvtrace_recorder.session.step import ActiveStep
    from kvtrace_recorder.taps.call import Call

Bools = NDArray[np.bool_]
#: A decode step's mask is looked at once in so many steps.
CHECK_EVERY = 64


def token_mask(mask: Any, past: int, batch: int, length: int) -> Bools:
    """Which tokens of a step are tokens rather than padding.

    Parameters
    ----------
    mask : torch.Tensor, dict or None
        `attention_mask` as the model was given it: [batch, tokens] of 0 and 1, or what `generate`
        made of that for a static cache, [batch, 1, query, key], or a dict of those.
    past : int
        Slots filled before the step.
    batch, length : int
        Shape of the step.

    Returns
    -------
    numpy.ndarray
        [batch, length] of bool.

    Raises
    ------
    UnrecordableError
        For a mask of another kind.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return np.ones((batch, length), bool)
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise UnrecordableError(f"the attention mask is a {type(mask).__name__} of unknown form")
    covered = mask.shape[-1]
    if covered < length or (covered < past + length and covered != length and mask.ndim == 2):
        raise UnrecordableError(f"the attention mask covers {covered} of {past + length} tokens")
    # A mask may cover the step alone, or a window: then the step stands at its end.
    start = past if covered >= past + length else covered - length
    if mask.ndim == 2:
        # A view in numpy: for a decode step torch's calls would cost more than all else.
        columns = mask.cpu().numpy()[:, start : start + length] != 0
    else:
        # A token sees itself, padding sees nothing.
        own = mask[:, 0, -length:, start : start + length]
        columns = seen_keys(torch.diagonal(own, dim1=1, dim2=2))
    return np.broadcast_to(columns, (batch, length)).copy()


def is_check_due(step: ActiveStep) -> bool:
    """Whether the masks of a step are looked at."""
    return not step.past or step.length > 1 or step.entry.steps % CHECK_EVERY == 1


def check_mask(step: ActiveStep, call: Call, spec: LayerSpec, offset: int) -> None:
    """Compare a few rows of the mask with what a reader of the trace will assume.

    Parameters
    ----------
    step : ActiveStep
        The running step.
    call : Call
        The attention call.
    spec : LayerSpec
        The layer.
    offset : int
        Slot of the first key.

    Raises
    ------
    UnrecordableError
        Where the mask adds a bias, or hides or shows other keys (packed sequences, prefixes seen
        in both directions, trees).
    """
    mask = call.mask
    shows = _shower(mask)
    if shows is None:
        _check_no_mask(step, call, spec)
        return
    if not is_check_due(step):
        return
    seen_before = (id(mask), spec.attention_kind, spec.sliding_window)
    if seen_before in step.checked:
        return
    step.checked.add(seen_before)
    # A mask may be wider than the keys, or as wide as they will be.
    slots = offset + np.arange(mask.shape[3] if isinstance(mask, torch.Tensor) else call.k.shape[2])
    for row in range(step.batch):
        queries = sample_tokens(step.real[row])
        if not len(queries):
            continue
        expected = _expected(step, row, step.past + queries, slots, spec)
        if not np.array_equal(seen_keys(shows(row, queries, len(slots))), expected):
            raise UnrecordableError(
                f"the mask of layer {spec.layer} is not that of {spec.attention_kind} attention"
                " over one sequence"
            )


def _shower(mask: Any) -> Callable[[int, NDArray[np.int64], int], torch.Tensor] | None:
    """Gives [query, key] of some queries of a batch row; None where a kernel takes no mask."""
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return lambda row, queries, _: mask[
            row if mask.shape[0] > 1 else 0, 0, torch.as_tensor(queries).to(mask.device)
        ]
    if not hasattr(mask, "mask_mod"):
        return None
    # Flex attention's: a function of the indices beside the blocks made from it.
    device = mask.kv_num_blocks.device

    def shown(row: int, queries: NDArray[np.int64], keys: int) -> torch.Tensor:
        first, second = torch.as_tensor(queries)[:, None], torch.arange(keys)[None, :]
        place = [torch.tensor(row), torch.tensor(0), first, second]
        found: torch.Tensor = mask.mask_mod(*(x.to(device) for x in place))
        return found.expand(len(queries), keys)

    return shown


def _check_no_mask(step: ActiveStep, call: Call, spec: LayerSpec) -> None:
    if spec.sliding_window is None:
        return
    kernel = str(getattr(step.model.config, "_attn_implementation", ""))
    if not kernel.startswith(("sdpa", "eager")):
        return
    if call.mask is None and step.length > 1 and call.k.shape[2] > spec.sliding_window:
        raise UnrecordableError(
            f"layer {spec.layer} names a window of {spec.sliding_window} and did not apply it"
        )


def sample_tokens(real: Bools) -> NDArray[np.int64]:
    """The first, a middle and the last token of a row of the step."""
    tokens = np.flatnonzero(real)
    return np.unique(tokens[[0, len(tokens) // 2, -1]]) if len(tokens) else tokens


def _expected(
    step: ActiveStep,
    row: int,
    queries: NDArray[np.int64],
    slots: NDArray[np.int64],
    spec: LayerSpec,
) -> Bools:
    held = step.entry.real.shape[1]
    real = np.zeros(len(slots), bool)
    inside = slots < held
    real[inside] = step.entry.real[row, slots[inside]]
    if spec.attention_kind == "bidirectional":
        return np.broadcast_to(real, (len(queries), len(slots)))
    distance = queries[:, None] - slots[None, :]
    seen = (distance >= 0) & real
    if spec.sliding_window is not None:
        seen &= distance < spec.sliding_window
    return np.asarray(seen)


def seen_keys(mask: torch.Tensor) -> Bools:
    """Visible keys of a mask, which is bool or is added to the scores."""
    if mask.dtype == torch.bool:
        return np.asarray(mask.cpu().numpy())
    values = mask.detach().float().cpu().numpy()
    # Hidden is the type's lowest number, or more where two masks were added.
    seen = values > np.finfo(np.float32).min / 2 if mask.dtype != torch.float16 else values > -3e4
    if (values[seen] != 0).any():
        raise UnrecordableError("the mask adds a bias to the scores")
    return np.asarray(seen)
