"""An interrupted training run ends with the weights of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from kvtrace_recorder.demo.train import Budget, Recipe, Training

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
    bos_token_id=0,
)


def tiny_run(out: Path) -> Training:
    stream = np.tile(np.arange(1, 64, dtype=np.uint16), 200)  # synthetic text
    recipe = Recipe(batch_tokens=1024, medium_from=0.3, long_from=2, longest_from=2, warmup_steps=3)
    return Training(TINY, stream, stream, out, recipe, Budget(steps=12), torch.device("cpu"))


def test_resuming_gives_the_same_weights(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = tiny_run(tmp_path / "whole")
    before = whole.heldout_loss(1)
    whole.run()
    assert whole.heldout_loss(1) < before

    tiny_run(tmp_path / "parts").run(stop_at_step=5)
    resumed = tiny_run(tmp_path / "parts")
    assert resumed.step == 5
    resumed.run()
    assert (resumed.step, resumed.tokens) == (whole.step, whole.tokens) == (12, 12 * 1024)
    for (name, a), b in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    training = tiny_run(tmp_path)
    training.stop()
    training.run()
    assert tiny_run(tmp_path).step == 1
    assert (tmp_path / "snapshots" / "000000000000.safetensors").exists()
