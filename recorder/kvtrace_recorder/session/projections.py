"""The output projections of a model's attention: what some policies weigh values by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

MOST_BYTES = 2**26
"""What they may take of a trace; a larger model is recorded without."""

NAMES = ("o_proj", "out_proj", "dense", "wo")
"""What families of transformers call them inside an attention module."""


def output_projections(model: Any, dtype: str, most_bytes: int = MOST_BYTES) -> NDArray[Any] | None:
    """Output projection of every layer, by the layers' own numbers.

    Parameters
    ----------
    model : torch.nn.Module
    dtype : str
        float16 or float32.
    most_bytes : int
        None where they would take more.

    Returns
    -------
    numpy.ndarray or None
        [layer, hidden, q_head * value_dim]; None where a layer has none that is a plain matrix, or
        they differ in shape, and while training, which changes them.
    """
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        own = [getattr(module, name, None) for name in NAMES]
        # Not quantised, adapted, flattened or spread over devices: a plain matrix.
        weights = [x.weight for x in own if type(x) is torch.nn.Linear and _is_plain(x.weight)]
        if isinstance(number, int) and "attention" in type(module).__name__.lower() and weights:
            if number in found:  # of an encoder-decoder two layers have each number
                return None
            found[number] = weights[0]
    shapes = {tuple(weight.shape) for weight in found.values()}
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if len(shapes) != 1 or sorted(found) != list(range(layers or 0)) or model.training:
        return None
    size = sum(weight.numel() for weight in found.values()) * np.dtype(dtype).itemsize
    if size > most_bytes:
        return None
    kept = getattr(torch, dtype)
    return np.stack([found[i].detach().to("cpu", kept).numpy() for i in sorted(found)])


def _is_plain(weight: torch.Tensor) -> bool:
    return type(weight.data) is torch.Tensor and weight.ndim == 2 and not weight.is_meta
