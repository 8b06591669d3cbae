"""What a trace says about a model and its layers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import ModelInfo


class ModelState:
    """A model as the session knows it.

    Parameters
    ----------
    key : int
        The session's number for it.
    model : torch.nn.Module
        Of transformers, or any other.
    """

    def __init__(self, key: int, model: Any) -> None:
        self.is_plain = not isinstance(model, PreTrainedModel)
        self.config = None if self.is_plain else model.config
        described = _describe_plain(model) if self.is_plain else describe(model)
        self.info = ModelInfo(key, str(getattr(self.config, "_name_or_path", "")), described)
        self.parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self.end_tokens = _end_tokens(model)
        #: Layers that every step must show; None until the first whole step.
        self.expected: frozenset[int] | None = None
        self.specs: dict[int, LayerSpec] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._names = {id(module): name for name, module in model.named_modules()}

    def name_of(self, module: Any) -> str | None:
        """Name of a module in the model."""
        return self._names.get(id(module))

    def layer_of(self, module: Any, nth: int = 0) -> int:
        """Number of an attention module's nth call in a step.

        Its own `layer_idx` (GPT-Neo says `layer_id`), else in the order of first calls.
        """
        key = (id(module), nth)
        if key not in self._numbers:
            own = getattr(module, "layer_idx", getattr(module, "layer_id", None))
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
        # Some configurations hold types; what goes to the writer is plain.
        "config": json.loads(json.dumps(config.to_dict(), default=str)),
    }


def _describe_plain(model: Any) -> dict[str, Any]:
    """The same of a model that has no configuration."""
    first = next(model.parameters(), None)
    unknown = ("num_layers", "hidden_size", "vocab_size", "attn_implementation")
    return {
        **dict.fromkeys(unknown),
        "name": type(model).__name__,
        "architecture": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": None if first is None else str(first.dtype).removeprefix("torch."),
        "device": None if first is None else str(first.device),
        "config": {},
    }


def _end_tokens(model: Any) -> tuple[frozenset[int], frozenset[int]]:
    """Tokens that end a sequence, and tokens that a finished row of a batch is filled with."""
    ends: set[int] = set()
    fills: set[int] = set()
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends |= _token_set(getattr(source, "eos_token_id", None))
        fills |= _token_set(getattr(source, "pad_token_id", None))
    return frozenset(ends), frozenset(ends | fills)


def _token_set(value: Any) -> set[int]:
    if isinstance(value, int):
        return {value}
    return {x for x in value if isinstance(x, int)} if isinstance(value, list | tuple) else set()
