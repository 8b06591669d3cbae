"""Models that are not transformers': whatever attends in PyTorch is recorded, outputs unchanged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - everybody's name for it
from torch.nn.functional import scaled_dot_product_attention

import kvtrace
from kvtrace.cli import main
from kvtrace_recorder import record

BATCH, TOKENS, WIDTH, HEADS = 2, 13, 32, 4
Array = np.ndarray[Any, Any]


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(3)


class Attention(nn.Module):
    """Self-attention of 4 query heads, which keeps what its softmax should give."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.width = WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, self.kv_heads * self.width)
        self.v = nn.Linear(WIDTH, self.kv_heads * self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], -1, self.width)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        self.own = self.expected(3 * q, k).detach()
        return self.attend(3 * q, k, v).transpose(1, 2).flatten(2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.kv_heads != HEADS
        )

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k.repeat_interleave(HEADS // self.kv_heads, dim=1)
        return q @ k.transpose(2, 3) / math.sqrt(self.width)

    def bias(self, length: int) -> torch.Tensor:
        return torch.full((length, length), -torch.inf).triu(1)

    def expected(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        # The method: torch.softmax would be recorded as a call of its own.
        return (self.scores(q, k) + self.bias(q.shape[2])).softmax(dim=-1)


class Grouped(Attention):
    kv_heads = 2


class ImportedByName(Attention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=self.bias(q.shape[2]), scale=None)


class Bidirectional(Attention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def bias(self, length: int) -> torch.Tensor:
        return torch.zeros(length, length)


class Sliding(ImportedByName):
    def bias(self, length: int) -> torch.Tensor:
        far = torch.full((length, length), -torch.inf).tril(-5)
        return super().bias(length) + far


class AlibiMask(ImportedByName):
    def bias(self, length: int) -> torch.Tensor:
        places = torch.arange(length)
        slopes = torch.tensor([0.5, 0.3, 0.1, 0.0])[:, None, None]
        return super().bias(length) + slopes * (places - places[:, None])


class ByHand(Attention):
    """As in a tutorial: scores, mask, softmax, product."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        att = self.scores(q, k) + self.bias(q.shape[2])
        att = F.softmax(att, dim=-1)
        return att @ v


class ByHandOddScale(ByHand):
    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return 0.123 * (q @ k.transpose(2, 3))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.scores(q, k) + self.bias(q.shape[2]), dim=-1) @ v


class ByHandAlibi(AlibiMask, ByHand):
    attend = ByHand.attend


class Model(nn.Module):
    """A plain model over token ids."""

    def __init__(self, kind: type[Attention]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        found: torch.Tensor = x
        return found


def ids() -> torch.Tensor:
    return torch.randint(50, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def recorded(model: nn.Module, path: Path, *args: Any, **kwargs: Any) -> kvtrace.Trace:
    """Run a model without and with a recording, and compare; its trace."""
    with torch.no_grad():
        plain = model(*args, **kwargs)
        with record(model, path, dtype="float32", strict=True) as recording:
            found = model(*args, **kwargs)
    assert torch.equal(plain, found)
    assert recording.gaps == {}
    trace = kvtrace.open(path)
    assert trace.signals >= {"q", "k", "v", "lse"}
    return trace


def check(trace: kvtrace.Trace, layer: int, own: Array) -> None:
    """Compare a layer with attention [batch, head, row, key]."""
    for request in range(len(own)):
        for head in range(HEADS):
            found = trace.attention(layer, head, request=request)
            np.testing.assert_allclose(found, own[request, head], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "attention_kind"),
    [
        (Attention, "full"),
        (Grouped, "full"),
        (ImportedByName, "full"),
        (Bidirectional, "bidirectional"),
        (Sliding, "sliding"),
        (AlibiMask, "full"),
        (ByHand, "full"),
        (ByHandOddScale, "full"),
        (ByHandAlibi, "full"),
    ],
)
def test_a_model_of_ones_own_is_recorded(
    kind: type[Attention], attention_kind: str, tmp_path: Path
) -> None:
    model = Model(kind)
    trace = recorded(model, tmp_path / "a.kvtrace", ids())
    assert trace.rows == BATCH * TOKENS
    assert [r.tokens for r in trace.requests()] == [TOKENS] * BATCH
    assert trace.tokens(1)["token_id"].to_pylist() == ids()[1].tolist()
    assert [layer.name for layer in trace.layers] == ["blocks.0", "blocks.1"]
    assert {layer.attention_kind for layer in trace.layers} == {attention_kind}
    assert {layer.num_kv_heads for layer in trace.layers} == {kind.kv_heads}
    described = trace.table("models").to_pylist()[0]
    assert described["architecture"] == "Model"
    assert described["num_parameters"] == sum(p.numel() for p in model.parameters())
    block: Any
    for layer, block in enumerate(model.blocks):
        check(trace, layer, block.own.numpy())


class Wrapped(nn.Module):
    """nn.MultiheadAttention inside a model."""

    def __init__(self, *, need_weights: bool, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor, **masks: Any) -> torch.Tensor:
        found: torch.Tensor = self.attention(x, x, x, need_weights=self.need_weights, **masks)[0]
        return found


def _masks(name: str) -> dict[str, Any]:
    if name == "causal":
        return {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)}
    if name == "padding":
        return {"key_padding_mask": torch.arange(TOKENS) >= torch.tensor([[TOKENS], [9]])}
    return {}


@pytest.mark.parametrize(
    ("mask", "need_weights", "training", "batch_first"),
    [
        # The fast path, which takes batches first and no training.
        ("none", True, False, True),
        ("causal", False, False, True),
        ("padding", False, False, True),
        # Scores and softmax in Python, for the weights.
        ("none", True, True, True),
        ("causal", True, False, False),
        ("padding", True, True, False),
        # F.scaled_dot_product_attention.
        ("none", False, True, False),
        ("causal", False, True, True),
        ("padding", False, False, False),
    ],
)
def test_multihead_attention_is_recorded(
    mask: str, need_weights: bool, training: bool, batch_first: bool, tmp_path: Path
) -> None:
    model = Wrapped(need_weights=need_weights, batch_first=batch_first).train(training)
    with torch.no_grad():
        model.attention.in_proj_weight.mul_(3)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    x = x if batch_first else x.transpose(0, 1)
    trace = recorded(model, tmp_path / "a.kvtrace", x, **_masks(mask))
    with torch.no_grad():
        own = model.attention(x, x, x, average_attn_weights=False, **_masks(mask))[1].numpy()
    lengths = [TOKENS, 9] if mask == "padding" else [TOKENS, TOKENS]
    assert [r.tokens for r in trace.requests()] == lengths
    assert [layer.name for layer in trace.layers] == ["attention"]
    assert trace.tokens(0)["token_id"].to_pylist() == [None] * TOKENS
    for request, length in enumerate(lengths):
        for head in range(HEADS):
            found = trace.attention(0, head, request=request)
            expected = own[request, head, :length, :length]
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("norm_first", "padded", "training"),
    [(True, False, False), (False, True, False), (True, True, False), (True, True, True)],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_is_recorded_and_stays_on_its_fast_path(
    norm_first: bool, padded: bool, training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = torch._transformer_encoder_layer_fwd

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2).train(training)
    with torch.no_grad():
        for block in model.layers:
            block.self_attn.in_proj_weight.mul_(3)
    options = {"src_key_padding_mask": _masks("padding")["key_padding_mask"]} if padded else {}
    x = torch.randn(BATCH, TOKENS, WIDTH)
    trace = recorded(model, tmp_path / "a.kvtrace", x, **options)
    assert len(calls) == (0 if training else 4)
    lengths = [TOKENS, 9 if padded else TOKENS]
    assert [r.tokens for r in trace.requests()] == lengths
    assert [layer.name for layer in trace.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    for request, length in enumerate(lengths):
        given = x[request : request + 1, :length]
        for number, block in enumerate(model.layers):
            with torch.no_grad():
                seen = block.norm1(given) if norm_first else given
                own = block.self_attn(seen, seen, seen, average_attn_weights=False)[1]
                given = block(given)
            for head in range(HEADS):
                found = trace.attention(number, head, request=request)
                np.testing.assert_allclose(found, own[0, head].numpy(), atol=1e-5)


@pytest.mark.writer_process
def test_outputs_of_a_model_of_ones_own_are_verified(tmp_path: Path) -> None:
    model, path = Model(Grouped), tmp_path / "a.kvtrace"
    with torch.no_grad(), record(model, path, dtype="float32", strict=True, verify=True):
        model(ids())
    found = kvtrace.open(path).table("verifications").to_pylist()
    assert [(row["layer"], row["rows"]) for row in found] == [(0, 3), (1, 3)]
    assert max(row["max_error"] for row in found) < 1e-5


def test_alibi_of_chosen_heads_and_layers(tmp_path: Path) -> None:
    model, path = Model(ByHandAlibi), tmp_path / "a.kvtrace"
    with (
        torch.no_grad(),
        record(model, path, dtype="float32", strict=True, layers="1", heads="1,3") as recording,
    ):
        model(ids())
        model(ids())
    assert recording.rows == 4 * TOKENS
    trace = kvtrace.open(path)
    (layer,) = trace.layers
    assert (layer.layer, layer.name) == (1, "blocks.1")
    assert layer.kv_heads is not None
    assert list(layer.kv_heads) == [1, 3]
    block: Any = model.blocks[1]
    for request in range(4):
        for head in (1, 3):
            found = trace.attention(1, head, request=request)
            np.testing.assert_allclose(found, block.own[request % 2, head].numpy(), atol=1e-5)


def test_info_leaves_out_what_a_model_does_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(Model(Attention), tmp_path / "a.kvtrace", ids())
    assert main(["info", str(tmp_path / "a.kvtrace")]) == 0
    assert "model     Model (Model, float32, cpu)" in capsys.readouterr().out


@pytest.mark.writer_process
def test_a_training_step_keeps_its_gradients(tmp_path: Path) -> None:
    def gradients(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        model(ids()).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model = Model(Grouped)
    plain = gradients(model)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        found = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert (recording.gaps, recording.rows) == ({}, BATCH * TOKENS)


def test_recomputation_is_not_recorded_twice(tmp_path: Path) -> None:
    class Checkpointed(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = self.embed(ids)
            for block in self.blocks:
                x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return x

    model = Checkpointed(Attention)
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        model(ids()).sum().backward()
    assert (recording.gaps, recording.rows, recording.steps) == ({}, BATCH * TOKENS, 1)


def test_cross_attention_is_left_out_and_named(tmp_path: Path) -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    x, memory = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, 7, WIDTH)
    with torch.no_grad(), record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        model(x, memory)
    assert "MultiheadAttention of TransformerDecoder attended from 2 x 13 to 7 tokens" in next(
        iter(recording.gaps)
    )
    names = [layer.name for layer in kvtrace.open(tmp_path / "a.kvtrace").layers]
    assert names == ["layers.0.self_attn", "layers.1.self_attn"]


class Relative(ByHand):
    """A bias that no column of the trace describes."""

    def bias(self, length: int) -> torch.Tensor:
        return super().bias(length) + torch.arange(length).square() / length


def test_a_bias_of_another_kind_is_a_gap(tmp_path: Path) -> None:
    model = Model(Relative)
    with torch.no_grad(), record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        model(ids())
    assert recording.rows == 0
    assert "more than a scaled q k^T and ALiBi" in next(iter(recording.gaps))


def test_a_model_without_attention_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(3, 3)
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        model(torch.ones(2, 3))
    assert recording.steps == 1
    assert "q, k and v of Linear: no attention call passed the tap" in capsys.readouterr().err
