"""Windows, schedule and attention of the demo model's training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtrace_recorder.demo.chunked_attention import chunked_attention
from kvtrace_recorder.demo.train import Budget, Recipe
from kvtrace_recorder.demo.windows import BLOCK, Cursor, Windows

STREAM = np.arange(8 * BLOCK, dtype=np.uint16)
"""Synthetic: every token is its own position, so that a window shows where it came from."""


def test_an_epoch_uses_every_token_once_and_begins_windows_with_bos() -> None:
    windows = Windows(STREAM, bos=7, batch_tokens=4096, seed=1)
    seen = []
    for length in (512, 512, 1024, 1024, 1024, 2048, 4096):
        while True:
            inputs, targets = windows.next(length)
            assert (inputs[:, 0] == 7).all()
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            seen.append(targets.flatten())
            if windows.cursor.part == 0:
                break
        if windows.cursor.block == 8:
            break
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(8 * BLOCK))


def test_a_cursor_continues_where_it_was() -> None:
    one = Windows(STREAM, 0, 4096, seed=3)
    for _ in range(11):
        one.next(1024)
    other = Windows(STREAM, 0, 4096, seed=3)
    other.cursor = Cursor(**one.cursor.state())
    for _ in range(40):
        assert torch.equal(one.next(1024)[1], other.next(1024)[1])


def test_a_stream_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block of 4096"):
        Windows(STREAM[:100], 0, 4096, seed=0)


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = Recipe(learning_rate=1.0, warmup_steps=10, decay_share=0.5)
    assert recipe.rate(0, 0.0) == pytest.approx(0.1)
    assert recipe.rate(50, 0.4) == 1.0
    assert recipe.rate(50, 0.75) == pytest.approx(0.5)
    assert recipe.rate(50, 1.0) == 0.0


def test_windows_grow_to_4096() -> None:
    recipe = Recipe()
    found = [recipe.length(progress) for progress in (0.0, 0.3, 0.7, 0.85, 0.95)]
    assert found == [512, 512, 1024, 2048, 4096]


def test_the_budget_ends_by_whichever_comes_first() -> None:
    assert Budget(minutes=1).progress(5, 30.0) == 0.5
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(minutes=1, steps=10).progress(9, 30.0) == 0.9


@pytest.mark.parametrize("tokens", [1, 3, 64, 130])
def test_chunked_attention_equals_the_fused_kernel(tokens: int) -> None:
    torch.manual_seed(0)  # synthetic operands
    q = torch.randn(2, 8, tokens, 16)
    k, v = torch.randn(2, 2, 2, tokens, 16)
    out, weights = chunked_attention(torch.nn.Identity(), q, k, v, None, scaling=0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.25, enable_gqa=True
    )
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
