"""Models under torch.compile: recorded with rows, outputs equal to the compiled run without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F  # noqa: N812 - everybody's name for it
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

import kvtrace
from kvtrace_recorder import record

TOKENS = 17
IDS = torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(2))


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """The compiler's backend that runs its graphs in eager, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.graphs += 1
        return aot_eager(*args, **kwargs)


def llama(kernel: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **options,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=kernel).eval()


def run(model: Callable[..., Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def check(trace: kvtrace.Trace, model: Any) -> None:
    """Compare a trace of one call with the attention of an eager run."""
    assert [layer.name for layer in trace.layers] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(IDS, output_attentions=True).attentions
    for layer, expected in enumerate(own):
        for request in range(2):
            for head in range(4):
                found = trace.attention(layer, head, request=request)
                np.testing.assert_allclose(found, expected[request, head].numpy(), atol=1e-5)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_model_compiled_before_is_recorded_and_runs_on_as_before(
    kernel: str, tmp_path: Path
) -> None:
    model, backend = llama(kernel), Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    plain = run(compiled)
    for name in ("first", "second", "third"):
        with record(model, tmp_path / name, dtype="float32", strict=True) as recording:
            assert torch.equal(run(compiled), plain)
        assert (recording.gaps, recording.rows) == ({}, 2 * TOKENS)
        assert torch.equal(run(compiled), plain)
    # One more for recording, which later recordings find again: torch compiles a function a few
    # times only, and then refuses.
    assert backend.graphs == 2
    check(kvtrace.open(tmp_path / "third"), model)


def test_a_model_compiled_while_it_is_recorded_runs_on_afterwards(tmp_path: Path) -> None:
    model = llama()
    plain = run(model)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(run(compiled), plain)
    assert torch.equal(run(compiled), plain)
    assert (recording.gaps, recording.rows) == ({}, 2 * TOKENS)
    check(kvtrace.open(tmp_path / "a.kvtrace"), model)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_model_compiled_in_place(cache: str, tmp_path: Path) -> None:
    model = llama()
    model.compile(backend="aot_eager")

    def generate() -> torch.Tensor:
        found: torch.Tensor = model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=4,
            do_sample=False,
            cache_implementation=cache,
        )
        return found

    plain = generate()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        assert torch.equal(generate(), plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [r.tokens for r in trace.requests()] == [TOKENS + 3] * 2
    eager = llama("eager")
    with torch.no_grad():
        own = eager(plain[:, :-1], output_attentions=True).attentions
    for layer, expected in enumerate(own):
        found = trace.attention(layer, 3, request=1)
        np.testing.assert_allclose(found, expected[1, 3].numpy(), atol=1e-5)


def test_training_compiled_keeps_losses_and_gradients(tmp_path: Path) -> None:
    model: Any = llama().train()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = compiled(IDS, labels=IDS, use_cache=False).loss
        torch.autograd.backward(loss)
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = step()
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        found = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert (recording.gaps, recording.rows) == ({}, 2 * TOKENS)


class Plain(torch.nn.Module):
    """Causal attention of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(3 * q, k, v, is_causal=True)


@pytest.mark.writer_process
def test_a_plain_model_compiled_is_recorded(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = Plain(), torch.randn(2, 9, 16)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        plain = compiled(x)
        with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
            assert torch.equal(compiled(x), plain)
        assert recording.gaps == {}
        data = kvtrace.open(tmp_path / "a.kvtrace").layer_data(0, 1)
        assert data.q is not None
        expected = 3 * model.qkv(x)[1, :, :16].view(9, 2, 8)
    np.testing.assert_allclose(data.q, expected.numpy(), atol=1e-6)
    assert data.spec.attention_kind == "full"


def test_attention_that_only_its_own_code_knows_keeps_events_and_a_gap(tmp_path: Path) -> None:
    torch.manual_seed(7)
    config = GPTJConfig(
        vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, bos_token_id=1
    )
    model: Any = GPTJForCausalLM(config).eval()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(IDS).logits
        with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
            assert torch.equal(compiled(IDS).logits, plain)
    assert list(recording.gaps) == [
        "q, k and v of GPTJForCausalLM: no attention call passed the tap"
    ]
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    events = trace.table("kv_events").to_pylist()
    assert (trace.rows, [e["event"] for e in events]) == (
        2 * TOKENS,
        ["grow", "grow", "free", "free"],
    )


@pytest.mark.slow
def test_inductor_gives_the_same_bits(tmp_path: Path) -> None:
    model = llama()
    compiled = torch.compile(model, fullgraph=True)
    plain = run(compiled)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        assert torch.equal(run(compiled), plain)
    assert torch.equal(run(compiled), plain)
    assert (recording.gaps, recording.rows) == ({}, 2 * TOKENS)
    check(kvtrace.open(tmp_path / "a.kvtrace"), model)
