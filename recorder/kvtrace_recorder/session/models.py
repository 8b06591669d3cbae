"""What a trace says about a model and its layers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import ModelInfo


class ModelState:
    """A model as the session knows it.

    Parameters
    ----------
    key : int
        The session's number for it.
    model : torch.nn.Module
        A transformers model.
    """

    def __init__(self, key: int, model: Any) -> None:
        self.config = model.config
        self.info = ModelInfo(key, str(getattr(model.config, "_name_or_path", "")), describe(model))
        self.parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self.end_tokens = _end_tokens(model)
        #: Layers that every step must show; None until the first whole step.
        self.expected: frozenset[int] | None = None
        self.specs: dict[int, LayerSpec] = {}
        self._numbers: dict[int, int] = {}

    def layer_of(self, module: Any) -> int:
        """Number of an attention module: its own `layer_idx`, else in the order of first calls."""
        key = id(module)
        if key not in self._numbers:
            own = getattr(module, "layer_idx", None)
            taken = set(self._numbers.values())
            free = next(number for number in range(len(taken) + 1) if number not in taken)
            self._numbers[key] = own if isinstance(own, int) and own not in taken else free
        return self._numbers[key]

    def rope_theta(self, module: Any) -> float | None:
        """Base of the rotary embedding of a layer; None where there is none."""
        found = getattr(self.config, "rope_parameters", None)
        if isinstance(found, dict) and "rope_theta" not in found:
            found = found.get(getattr(module, "layer_type", None) or "full_attention")
        theta = found.get("rope_theta") if isinstance(found, dict) else None
        return None if theta is None else float(theta)


def describe(model: Any) -> dict[str, Any]:
    """Columns of table `models`, and `config`."""
    config = model.config
    name = str(getattr(config, "_name_or_path", "")) or type(model).__name__
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        # Of a directory what tells it from others, not where it lies on this machine.
        "name": "/".join(Path(name).parts[-2:]) if Path(name).is_dir() else name,
        "architecture": type(model).__name__,
        "num_layers": getattr(text, "num_hidden_layers", None),
        "hidden_size": getattr(text, "hidden_size", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "config": config.to_dict(),
    }


def _end_tokens(model: Any) -> tuple[frozenset[int], frozenset[int]]:
    """Tokens that end a sequence, and tokens that a finished row of a batch is filled with."""
    ends: set[int] = set()
    fills: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config):
        ends |= _token_set(getattr(source, "eos_token_id", None))
        fills |= _token_set(getattr(source, "pad_token_id", None))
    return frozenset(ends), frozenset(ends | fills)


def _token_set(value: Any) -> set[int]:
    if isinstance(value, int):
        return {value}
    return {x for x in value if isinstance(x, int)} if isinstance(value, list | tuple) else set()
