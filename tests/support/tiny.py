"""Tiny models of random weights, and what the tests of the recorder do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtrace

#: Of any decoder-only family.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Weights large enough that attention is not the same everywhere.
SHARP = {"head_dim": 8, "initializer_range": 0.5}
IDS = torch.tensor([[5, 9, 33, 12, 7, 8]])


def llama(**options: Any) -> Any:
    """A Llama, the same each time; options are its configuration's."""
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval()


def greedy(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    """Six tokens after the prompts."""
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    found: torch.Tensor = model.generate(ids, **{**given, "eos_token_id": None, **options})
    return found


def gaps(path: Path) -> list[dict[str, Any]]:
    """Rows of table `gaps`, those of one reason as one.

    A reason that lasts has a row a commit, and when the writer commits is a matter of time.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for gap in kvtrace.open(path).table("gaps").to_pylist():
        first = found.setdefault((gap["what"], gap["reason"]), gap)
        if first is not gap:
            first["count"] += gap["count"]
    return list(found.values())
