"""Encoder-decoders: encoder and decoder are steps of their own, of one model.

Generation calls the encoder by itself and the decoder inside the model; a plain forward pass calls
both inside. So steps begin where the halves are called, and the model around them is none.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

from transformers.modeling_utils import PreTrainedModel

ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class Half:
    """An encoder or a decoder of a larger model.

    Attributes
    ----------
    model : torch.nn.Module
        The whole model.
    kind : str
        encoder or decoder.
    parameters : list of str
        Names that its own forward pass takes.
    """

    model: Any
    kind: str
    parameters: list[str]


class Halves:
    """Knows the halves of the encoder-decoders that were seen."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], str, list[str]]]
        self._known = weakref.WeakKeyDictionary()

    def learn(self, model: Any) -> bool:
        """Look at a model; True where it is an encoder-decoder, now known with its halves."""
        found = halves_of(model)
        for kind, half in found.items():
            # The outermost model is seen first, and its halves are its own.
            self._known.setdefault(half, (weakref.ref(model), kind, parameters_of(half)))
        return bool(found)

    def of(self, module: Any) -> Half | None:
        """What `module` is a half of; None where it is none."""
        known = self._known.get(module)
        model = None if known is None else known[0]()
        return None if known is None or model is None else Half(model, *known[1:])


def parameters_of(model: Any) -> list[str]:
    """Names that a model's forward pass takes, in order."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def halves_of(model: Any) -> dict[str, Any]:
    """Encoder and decoder of a model, by kind; empty where it is no encoder-decoder."""
    if not isinstance(model, PreTrainedModel):
        return {}
    if not getattr(model.config, "is_encoder_decoder", False):
        return {}
    found = {ENCODER: model.get_encoder(), DECODER: model.get_decoder()}
    halves = [half for half in found.values() if isinstance(half, PreTrainedModel)]
    # A half that is asked for its own half answers with itself.
    whole = len(halves) == 2 and halves[0] is not halves[1] and model not in halves
    return found if whole else {}
