"""The operands of an attention call, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_NAMES = ("module", "query", "key", "value", "attention_mask")


@dataclass(slots=True)
class Call:
    """An attention call.

    Attributes
    ----------
    module : torch.nn.Module
        The attention layer.
    q, k, v : torch.Tensor
        [batch, q_head, query, head_dim], [batch, kv_head, key, head_dim or value_dim].
    mask : torch.Tensor or None
        Whatever the kernel takes.
    extra : dict
        scaling, sliding_window, softcap, s_aux, alibi_slopes and the rest.
    nth : int
        Which of its module's calls in the step this is.
    """

    module: Any
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any
    extra: dict[str, Any]
    nth: int = 0


def parse_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Name the operands of an attention function's call."""
    if len(args) == len(_NAMES):
        # How every model of transformers calls it; this runs once a layer and step.
        module, q, k, v, mask = args
        return Call(module, q, k, v, mask, kwargs)
    named: dict[str, Any] = dict(zip(_NAMES, args, strict=False)) | kwargs
    mask = named.get("attention_mask")
    return Call(named["module"], named["query"], named["key"], named["value"], mask, named)
