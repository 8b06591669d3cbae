"""What a model's forward pass was given, read without touching it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from kvtrace_recorder.session.halves import Half
from kvtrace_recorder.session.models import ModelState


@dataclass(frozen=True)
class StepInputs:
    """The inputs of one step.

    Attributes
    ----------
    token_ids : numpy.ndarray or None
        [batch, length]; None where embeddings were given.
    batch, length : int
        Their shape.
    mask : object
        `attention_mask`, in whatever form.
    cache : Cache or None
        `past_key_values`.
    past : int
        Slots filled in the cache.
    num_candidates : int
        Tokens at the end that were guessed rather than given: assisted decoding asks for the
        logits of each, and of the token before them.
    encoder_states : torch.Tensor or None
        [batch, encoder's token, hidden], what a decoder's cross attention reads.
    cross_cache : Cache or None
        Where its keys and values are kept.
    """

    token_ids: NDArray[np.int64] | None
    batch: int
    length: int
    mask: Any
    cache: Cache | None
    past: int
    num_candidates: int = 0
    encoder_states: Any = None
    cross_cache: Any = None

    @property
    def is_decode(self) -> bool:
        """Whether what is added to a cache is one token a row, and guesses that may follow it."""
        return self.past > 0 and self.length == 1 + self.num_candidates


def read_inputs(
    model: ModelState, half: Half | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> StepInputs | str:
    """Read what a model or one half of it was given; where it cannot be recorded, the reason."""
    parameters = model.parameters if half is None else half.parameters
    given = dict(zip(parameters, args, strict=False)) | kwargs
    name = model.info.columns["architecture"]
    states = given.get("encoder_hidden_states")
    if half is None and states is not None:
        return f"{name} was given the states of an encoder that is not part of it"
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    shaped = ids if ids is not None else embeddings
    if not isinstance(shaped, torch.Tensor) or shaped.ndim < 2:
        return f"{name} was given neither input_ids nor inputs_embeds of a batch"
    both = given.get("past_key_values")
    cache = getattr(both, "self_attention_cache", both)
    if cache is not None and not isinstance(cache, Cache):
        return f"{name} was given a cache of type {type(cache).__name__}"
    token_ids = ids.cpu().numpy() if isinstance(ids, torch.Tensor) and ids.ndim == 2 else None
    past = 0 if cache is None else int(cache.get_seq_length())
    batch, length = shaped.shape[:2]
    if _is_packed(given.get("position_ids"), given.get("attention_mask")):
        return f"{name} was given several sequences packed into one, which is not recorded yet"
    asked = given.get("logits_to_keep")
    candidates = min(asked, length) - 1 if cache is not None and isinstance(asked, int) else 0
    return StepInputs(
        token_ids,
        batch,
        length,
        given.get("attention_mask"),
        cache,
        past,
        max(0, candidates),
        states,
        getattr(both, "cross_attention_cache", None),
    )


def _is_packed(position_ids: Any, mask: Any) -> bool:
    """Whether positions begin anew within a row: some kernels take that for a new sequence."""
    if mask is not None or not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 2:
        return False
    return bool((position_ids.diff(dim=1) <= 0).any())
