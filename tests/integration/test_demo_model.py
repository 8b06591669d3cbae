"""The bundled model loads the ordinary way, is small, and has learned something."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvtrace_recorder import demo

MAX_BYTES = 12_000_000
PROMPT_LOSS_BOUND = 4.6
"""Nats; guessing costs log(4096) = 8.3, knowing only how common each token is about 6.3."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.set_num_threads(1)
    return demo.load()[0]


def test_the_directory_is_small() -> None:
    assert sum(f.stat().st_size for f in demo.MODEL_DIR.rglob("*")) <= MAX_BYTES


def test_the_shape_is_grouped_query_attention_in_float32(model: PreTrainedModel) -> None:
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (6, 8)
    assert config.num_key_value_heads in {2, 4}
    assert config.head_dim == 32
    assert config.max_position_embeddings >= 4096
    assert config.tie_word_embeddings
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_plain_loader_computes_in_float32_too() -> None:
    assert AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR).dtype == torch.float32


@pytest.mark.parametrize("text", ["plain", "größer — 日本語 🙂", "a\n\n\tb  c", "", "\x00\x7f é́"])
def test_the_tokenizer_begins_with_bos_and_round_trips(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert ids.count(0) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_batch_is_padded_on_the_left() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    batch = tokenizer(["one", "one two three four"], return_tensors="pt", padding=True)
    assert batch.attention_mask[0, 0] == 0
    assert batch.attention_mask[0, -1] == 1


def test_the_model_predicts_the_demo_prompt(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    ids = tokenizer(demo.PROMPT, return_tensors="pt").input_ids
    assert 400 <= ids.shape[1] <= 800
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < PROMPT_LOSS_BOUND < math.log(4096)
