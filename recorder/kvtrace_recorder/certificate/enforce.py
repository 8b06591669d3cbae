"""Evicted keys really hidden from the model: a mask a layer and KV head in every attention call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_utils import AttentionInterface

from kvtrace.errors import InputError
from kvtrace.model import Layer
from kvtrace.rope import Rope, ropes
from kvtrace.trace import Trace
from kvtrace_recorder.certificate.replayed import Reads
from kvtrace_recorder.taps.call import Call, parse_call
from kvtrace_recorder.taps.patch import Patch

NEVER = 2**31 - 1

See = Callable[[int, Call], None]
"""Shown the operands of a layer's attention call, before the kernel runs."""


class Attending:
    """While entered, the attention calls of a model's layers pass through here.

    What is looked up is patched, at class level, not what is registered: another name would change
    how the model makes its masks, and so the kernel that runs.

    Parameters
    ----------
    layers : mapping of int to Layer
        By the id of the attention module.
    evicted_at : mapping of int to torch.Tensor, optional
        By layer: int32 [kv_head, token], the row after which a key is hidden; NEVER otherwise,
        as are heads and tokens that are not there. Calls of layers without go through unchanged.
    see : callable, optional
        Shown every call.
    reads : Reads, optional
        What queries read that choose it, of what is held.
    ropes : mapping of int to Rope, optional
        By layer. Where given, keys are re-rotated to their places in the cache; calls must then
        be of one row, because another row's keys stand elsewhere.
    """

    def __init__(
        self,
        layers: Mapping[int, Layer],
        evicted_at: Mapping[int, torch.Tensor] | None = None,
        see: See | None = None,
        ropes: Mapping[int, Rope] | None = None,
        reads: Reads | None = None,
    ) -> None:
        self.ropes = ropes
        self._reads = reads
        self._layers = layers
        self._evicted_at = evicted_at or {}
        self._see = see
        self._patch = Patch(AttentionInterface, "get_interface", self._make)
        self.called: set[int] = set()

    def __enter__(self) -> Self:
        self._patch.apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._patch.restore()

    def check(self) -> None:
        """Refuse a model whose attention did not come through here.

        Raises
        ------
        InputError
            With the layers that are missing.
        """
        missing = sorted({spec.layer for spec in self._layers.values()} - self.called)
        if missing:
            raise InputError(
                f"the attention of layers {missing} does not go through transformers'"
                " AttentionInterface; evicted keys can be hidden only there; the replay of this"
                " model cannot be certified"
            )

    def _make(self, original: Any) -> Any:
        def get_interface(interface: Any, *args: Any, **kwargs: Any) -> Any:
            function = original(interface, *args, **kwargs)

            def attention(*operands: Any, **extra: Any) -> Any:
                call = parse_call(operands, extra)
                spec = self._layers.get(id(call.module))
                if spec is None:
                    return function(*operands, **extra)
                self.called.add(spec.layer)
                if self._see is not None:
                    self._see(spec.layer, call)
                if spec.layer not in self._evicted_at:
                    return function(*operands, **extra)
                evicted_at = self._evicted_at[spec.layer]
                mask, k = hide(call, spec, evicted_at, self._reads), call.k
                if self.ropes is not None:
                    k = renumbered(k, evicted_at, self.ropes[spec.layer])
                rest = {name: x for name, x in extra.items() if name not in _OPERANDS}
                return function(call.module, call.q, k, call.v, mask, **rest)

            return attention

        return get_interface


_OPERANDS = ("module", "query", "key", "value", "attention_mask")


def hide(
    call: Call, spec: Layer, evicted_at: torch.Tensor, reads: Reads | None = None
) -> torch.Tensor:
    """The mask of a call with the evicted keys hidden too: [1, q_head, row, key], to be added.

    A row sees a key that was evicted after it, or never, and of those what it reads; keys after
    the row and outside the layer's own window stay hidden whatever the model's mask says.
    """
    kv_heads, keys = call.k.shape[1:3]
    rows = call.q.shape[2]
    row = torch.arange(keys - rows, keys, device=call.q.device)[:, None]
    key = torch.arange(keys, device=call.q.device)[None, :]
    hidden = key > row
    if spec.sliding_window is not None:
        hidden |= key <= row - spec.sliding_window
    hidden = hidden.repeat(kv_heads, 1, 1)
    known = evicted_at[:kv_heads, None, :keys]
    hidden[: len(known), :, : known.shape[2]] |= known < row
    if reads is not None:
        read = reads.of(spec.layer, slice(keys - rows, keys), keys)
        unread = torch.from_numpy(~read).to(call.q.device)
        hidden[list(reads.kv_heads[spec.layer])] |= unread
    hidden = hidden.repeat_interleave(call.q.shape[1] // kv_heads, dim=0)[None]
    mask = torch.zeros(hidden.shape, dtype=call.q.dtype, device=call.q.device)
    own = call.mask
    if own is not None and own.dtype == torch.bool:
        hidden = hidden | ~own[..., :keys]
    elif own is not None:
        mask += own[..., :keys]
    return mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)


def renumbered(k: torch.Tensor, evicted_at: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Keys [1, kv_head, key, head_dim] turned to where they stand for the query of the last.

    A key comes nearer by every key between the two that was evicted; the query itself stays.
    """
    keys = k.shape[2]
    gone = torch.zeros(k.shape[1:3], dtype=torch.long, device=k.device)
    known = evicted_at[: len(gone), :keys]
    gone[: len(known), : known.shape[1]] = known < keys - 1
    nearer = gone.flip(1).cumsum(1).flip(1)
    turned = [
        rope.turn(of_head, by) for of_head, by in zip(_plain(k[0]), _plain(nearer), strict=True)
    ]
    return torch.from_numpy(np.stack(turned)[None]).to(k)


def known_ropes(trace: Trace, specs: list[Layer]) -> dict[int, Rope]:
    """How the layers of a trace turn their keys.

    Raises
    ------
    InputError
        Where that is not known.
    """
    found = ropes(trace, specs)
    if isinstance(found, str):
        raise InputError(
            f"{trace.path} cannot be re-rotated: {found}; a replay of a trace that can was"
            " expected; replay it without --rerotate"
        )
    return found


def _plain(values: torch.Tensor) -> NDArray[Any]:
    """As numpy has it: no bfloat16."""
    found = values.double() if values.is_floating_point() else values
    return np.asarray(found.cpu().numpy())


def attention_modules(model: Any, layers: list[Layer]) -> dict[int, Layer]:
    """The attention modules of a model by their ids, as the trace names its layers.

    Raises
    ------
    InputError
        For a layer that the model lacks.
    """
    by_name = dict(model.named_modules())
    by_index = {
        module.layer_idx: module
        for module in by_name.values()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "attention" in type(module).__name__.lower()
    }
    found = {}
    for spec in layers:
        # The name "" is the model itself: layers of older traces have none.
        module = (by_name.get(spec.name) if spec.name else None) or by_index.get(spec.layer)
        if module is None:
            raise InputError(
                f"layer {spec.layer} ({spec.name or 'unnamed'}) was not found in the model; the"
                " recorded model was expected; give it with --model"
            )
        found[id(module)] = spec
    return found


def as_tensors(evicted_at: NDArray[np.int32], model: Any) -> dict[int, torch.Tensor]:
    """`evicted_at [token, layer, kv_head]` of a replay as `Attending` takes it."""
    last = np.where(evicted_at < 0, NEVER, evicted_at).astype(np.int32).transpose(1, 2, 0)
    values = torch.from_numpy(np.ascontiguousarray(last)).to(model.device)
    return dict(enumerate(values))
