"""The bundled demo model: a small Llama trained on documentation text, and a prompt for it.

`MODEL_DIR` is an ordinary transformers directory; its README is the model card. The scripts that
made it lie beside this file: `corpus`, `train`, `export`, `evaluate`, `card`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_DIR = Path(__file__).parent / "kvtrace-demo"
"""Directory of the bundled model, for ``from_pretrained``."""

PROMPT = (Path(__file__).parent / "prompt.txt").read_text(encoding="utf-8")
"""About 600 tokens of text in the manner of documentation, with names that keep coming back."""


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the bundled model and its tokenizer.

    Returns
    -------
    tuple
        The model in evaluation mode, float32, with sdpa attention; and the tokenizer, which puts
        BOS in front of every text.
    """
    # torch takes seconds to import: only those who load the model pay for it.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(MODEL_DIR)
