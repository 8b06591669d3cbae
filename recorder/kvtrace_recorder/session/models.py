"""What a trace says about a model and its layers."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import ModelInfo
from kvtrace_recorder.session.halves import DECODER, ENCODER, halves_of, parameters_of
from kvtrace_recorder.taps.guard import UnrecordableError


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
        self.parameters = parameters_of(model)
        self.end_tokens = _end_tokens(model)
        #: Layers that every step must show, of each half; none until the first whole step.
        self.expected: dict[str | None, frozenset[int]] = {}
        self.specs: dict[int, LayerSpec] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        #: Layer numbers by index in the cache, and in that of cross attention.
        self.cached: dict[int, int] = {}
        self.cross_cached: dict[int, int] = {}
        self._halves = {id(m): kind for kind, x in halves_of(model).items() for m in x.modules()}
        self._kin = self._attention_modules(model)
        self._modules: dict[int, Any] = {}
        self._model = weakref.ref(model)
        self._biases: dict[str | None, weakref.ref[Any]] = {}
        for module in model.modules():
            if getattr(module, "has_relative_attention_bias", False) is True:
                self._biases.setdefault(self._halves.get(id(module)), weakref.ref(module))
        self._names = {id(module): name for name, module in model.named_modules()}

    def name_of(self, module: Any) -> str | None:
        """Name of a module in the model."""
        return self._names.get(id(module))

    @property
    def module(self) -> Any:
        """The model itself, as long as somebody has it."""
        return self._model()

    @property
    def has_halves(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return bool(self._halves)

    def is_cross(self, module: Any) -> bool:
        """Whether an attention module of the decoder reads the encoder's tokens."""
        return self._halves.get(id(module)) == DECODER and not getattr(module, "is_causal", True)

    def bias_source(self, module: Any) -> Any:
        """The module that learned the position bias of an attention module; None without.

        Its own, or that of its half's first layer, which T5 hands on to the others.
        """
        if getattr(module, "has_relative_attention_bias", False) is True:
            return module
        found = self._biases.get(self._halves.get(id(module)))
        return None if found is None else found()

    def cache_index(self, module: Any, layer: int) -> int:
        """Where the cache keeps the keys of an attention module."""
        index = layer
        if self._halves:
            own = getattr(module, "layer_idx", None)
            index = layer if own is None else int(own)
        (self.cross_cached if self.is_cross(module) else self.cached)[index] = layer
        return index

    def layer_module(self, number: int) -> Any:
        """The attention module that says it is a layer, or something to stand for it.

        Raises
        ------
        UnrecordableError
            Where several say so, as those of an encoder and a decoder do.
        """
        if number not in self._modules:
            model = self._model()
            modules = () if model is None else model.modules()
            own = [x for x in modules if getattr(x, "layer_idx", None) == number]
            named = [x for x in own if "attention" in type(x).__name__.lower()]
            if len(named) > 1:
                raise UnrecordableError(
                    f"{len(named)} attentions say that they are layer {number}, and under"
                    " torch.compile nothing else tells them apart"
                )
            self._modules[number] = named[0] if named else SimpleNamespace(layer_idx=number)
        return self._modules[number]

    def layer_of(self, module: Any, nth: int = 0) -> int:
        """Number of an attention module's nth call in a step.

        Its own `layer_idx` (GPT-Neo says `layer_id`), else in the order of first calls. In an
        encoder-decoder: the encoder's layers, then the decoder's own, then its cross attention.
        """
        key = (id(module), nth)
        if key not in self._numbers:
            first = len(self._numbers)
            for number, other in enumerate(self._kin.pop(type(module), ()), start=first):
                self._numbers[other, 0] = number
        if key not in self._numbers:
            own = getattr(module, "layer_idx", getattr(module, "layer_id", None))
            taken = set(self._numbers.values())
            free = next(number for number in range(len(taken) + 1) if number not in taken)
            self._numbers[key] = own if isinstance(own, int) and own not in taken else free
        return self._numbers[key]

    def _attention_modules(self, model: Any) -> dict[type, list[int]]:
        """Attention modules of an encoder-decoder by type, in the order of their numbers."""
        found: dict[type, list[tuple[int, int]]] = {}
        for module in model.modules() if self._halves else ():
            half = self._halves.get(id(module))
            if half is not None and hasattr(module, "is_causal"):
                place = 0 if half == ENCODER else 2 if self.is_cross(module) else 1
                found.setdefault(type(module), []).append((place, id(module)))
        # Sorted by place alone: their own order stays.
        return {
            kind: [key for _, key in sorted(kin, key=lambda one: one[0])]
            for kind, kin in found.items()
        }

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


def has_transformers(model: Any) -> bool:
    """Whether a module is a model of transformers, or contains one."""
    return any(isinstance(module, PreTrainedModel) for module in model.modules())
