"""Replay and viewer over traces with cross attention, with forks and with two models."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

import kvtrace
from kvtrace import InputError
from kvtrace_recorder import record
from kvtrace_viewer.app import create_app
from kvtrace_viewer.asgi import ask
from kvtrace_viewer.derived.encode import encode
from kvtrace_viewer.replay import replay, replayable

TEXT, NEW = 30, 12
IDS = torch.arange(3, 3 + TEXT)[None] % 37 + 3


def llama(layers: int = 2) -> Any:
    """A tiny model of random weights."""
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cross.kvtrace of an encoder-decoder, beams.kvtrace, and both.kvtrace of two models."""
    root = tmp_path_factory.mktemp("traces")
    torch.manual_seed(1)
    config = BartConfig(
        vocab_size=48,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        eos_token_id=None,
        forced_eos_token_id=None,
        decoder_start_token_id=2,
        pad_token_id=0,
    )
    bart = BartForConditionalGeneration(config).eval()
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    mask = torch.ones_like(IDS)
    with record(bart, root / "cross.kvtrace", dtype="float32", strict=True):
        bart.generate(IDS, attention_mask=mask, eos_token_id=None, **options)
    model = llama()
    with record(model, root / "beams.kvtrace", dtype="float32", strict=True):
        model.generate(IDS, attention_mask=mask, num_beams=3, **options)
    with record(None, root / "both.kvtrace", dtype="float32", strict=True), torch.no_grad():
        model(IDS)
        llama(layers=3)(IDS)
    return root


def test_a_cross_map_has_the_encoders_tokens_as_keys(folder: Path) -> None:
    trace = kvtrace.open(folder / "cross.kvtrace")
    server = create_app(folder).server
    own = trace.attention(3, 1, request=1)
    assert own.shape == (NEW, TEXT)
    place = {"trace": "cross.kvtrace", "request": 1, "layer": 3, "head": 1}
    tile = ask(server, "/api/tile", {**place, "level": 0, "row": 0, "column": 0, "scale": "linear"})
    cells = np.frombuffer(tile.content, np.uint8).reshape(2, 256, 256)[0]
    np.testing.assert_array_equal(cells[:NEW, :TEXT], encode(own, "linear"))
    assert not cells[NEW:].any()
    assert not cells[:, TEXT:].any()
    row = np.frombuffer(ask(server, "/api/row", {**place, "row": 5}).content, np.float32)
    np.testing.assert_allclose(row, own[5], rtol=1e-5)
    assert ask(server, "/api/row", {**place, "row": NEW}).status == 400
    assert ask(server, "/api/marks", place).json == []
    thumbs = ask(server, "/api/thumbnails", {k: place[k] for k in ("trace", "request", "layer")})
    assert len(thumbs.content) == 2 * 2 * NEW * NEW
    window = {"row_start": 0, "row_stop": 99, "key_start": 28, "key_stop": 99, "kind": "csv"}
    text = ask(server, "/api/export", {**place, **window}).content.decode()
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["key"] for line in lines[:2]] == ["28", "29"]
    assert len(lines) == NEW * 2
    # An encoder's layer is none of the decoder's, and is shown in its own request.
    assert ask(server, "/api/thumbnails", {**place, "layer": 0}).status == 400
    assert ask(server, "/api/thumbnails", {**place, "layer": 0, "request": 0}).status == 200


def test_the_pages_of_such_a_trace_open(folder: Path) -> None:
    trace = kvtrace.open(folder / "cross.kvtrace")
    from kvtrace_viewer.pages import attention
    from kvtrace_viewer.pages import replay as replay_page

    text = str(attention.build("cross.kvtrace", trace, {"request": "1"}))
    assert "'keys_of': 0" in text
    assert "'name': 'model.decoder.layers.0.encoder_attn'" in text
    text = str(replay_page.build("cross.kvtrace", trace, {}))
    assert "'requests': {'1':" in text


def test_only_the_decoders_own_layers_are_replayed(folder: Path) -> None:
    trace = kvtrace.open(folder / "cross.kvtrace")
    assert {row["replay"] for row in replayable(trace) if row["policy"] == "h2o"} != {"no"}
    (result,) = replay(trace, ["streaming_llm:sinks=1"], ["25%"], when="step", store=False)
    assert list(result.requests) == [1]
    assert sorted(set(result.heads["layer"])) == [1, 2]
    assert any("layers 3-4 are left out: cross attention" in note for note in result.notes)
    with pytest.raises(InputError, match="attention runs both ways"):
        replay(trace, ["lru"], ["25%"], requests=[0], store=False)


def test_requests_that_share_rows_are_replayed_one_at_a_time(folder: Path) -> None:
    trace = kvtrace.open(folder / "beams.kvtrace")
    with pytest.raises(InputError, match=r"requests 0-2 .* some requests share rows.*--request N"):
        replay(trace, ["lru"], ["25%"], store=False)
    assert all(
        "with --request N, as some requests share rows" in row["reason"]
        for row in replayable(trace)
    )
    (result,) = replay(trace, ["lru"], ["25%"], requests=[1], when="step", store=False)
    assert result.tokens == TEXT + NEW - 1


def test_models_are_replayed_one_at_a_time(folder: Path) -> None:
    trace = kvtrace.open(folder / "both.kvtrace")
    with pytest.raises(InputError, match="the requests are of several models"):
        replay(trace, ["lru"], ["25%"], store=False)
    (result,) = replay(trace, ["lru"], ["25%"], requests=[1], when="stream", store=False)
    assert sorted(set(result.heads["layer"])) == [0, 1, 2]
