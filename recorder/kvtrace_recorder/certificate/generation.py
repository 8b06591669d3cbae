"""Greedy generation with the full cache and with kept sets enforced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from kvtrace.model import Layer
from kvtrace_recorder.certificate.enforce import Attending
from kvtrace_recorder.certificate.forward import EnforcedRun, chunks, forward
from kvtrace_recorder.certificate.result import Generation


def generate_both(
    model: Any,
    tokenizer: Any,
    prompt: torch.Tensor,
    layers: Mapping[int, Layer],
    run: EnforcedRun,
    count: int,
) -> Generation:
    """Generate `count` tokens from a prompt [1, token], each time the likeliest.

    The positions that the replay evicted are hidden when it evicted them, whatever was generated
    there: exact for what decides by position or once after the prompt, and until the texts part
    wherever the recorded tokens are the greedy ones.
    """
    full = _generate(model, prompt, layers, Attending(layers), count)
    hook = Attending(layers, run.evicted_at, ropes=run.ropes, reads=run.reads)
    evicted = _generate(model, prompt, layers, hook, count)
    apart = [i for i, (a, b) in enumerate(zip(full, evicted, strict=True)) if a != b]
    return Generation(
        count, apart[0] if apart else None, _text(tokenizer, full), _text(tokenizer, evicted)
    )


def _generate(
    model: Any,
    prompt: torch.Tensor,
    layers: Mapping[int, Layer],
    hook: Attending,
    count: int,
) -> list[int]:
    cache = DynamicCache()
    logits = torch.empty(0)
    for rows in chunks(model, prompt.shape[1], layers, []):
        logits = forward(model, prompt[:, rows], cache, hook)
    found: list[int] = []
    while True:
        token = logits[-1].argmax().reshape(1, 1)
        found.append(int(token))
        if len(found) == count:
            return found
        logits = forward(model, token, cache, hook)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return "" if tokenizer is None else str(tokenizer.decode(ids))
