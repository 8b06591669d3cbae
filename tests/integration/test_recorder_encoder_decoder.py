"""Encoder-decoders: two requests a sequence, and cross attention between their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import kvtrace
from kvtrace import InputError
from kvtrace_recorder import record
from kvtrace_viewer.replay import replay

NEW = 7
#: Encoder, decoder, cross: three encoder layers, two decoder layers.
ENCODER, DECODER, CROSS = (0, 1, 2), (3, 4), (5, 6)


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


def build(kind: Any = BartForConditionalGeneration, kernel: str = "sdpa") -> Any:
    """A tiny model of random weights."""
    torch.manual_seed(5)
    options = {
        "vocab_size": 40,
        "d_model": 48,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 2,
    }
    configuration = MarianConfig if kind is MarianMTModel else BartConfig
    model = kind._from_config(configuration(**options), attn_implementation=kernel)
    # Small default weights make attention almost uniform; a wrong row would hide in it.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(8)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model.eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the second padded on the right, and their mask."""
    ids = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, 8:], mask[1, 8:] = 0, 0
    return ids, mask


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def own_maps(model: Any, encoder: list[int], decoder: list[int]) -> list[np.ndarray[Any, Any]]:
    """[q_head, row, key] of every layer, by an eager run of one pair of sequences."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(
            torch.tensor([encoder]),
            decoder_input_ids=torch.tensor([decoder]),
            output_attentions=True,
        )
    model.set_attn_implementation(kernel)
    maps = found.encoder_attentions + found.decoder_attentions + found.cross_attentions
    return [a[0].numpy() for a in maps]


def check(trace: kvtrace.Trace, model: Any, request: int) -> tuple[list[int], list[int]]:
    """Assert that a decoder's maps, and its encoder's, are the model's; tokens of both."""
    source = {r.request: r.encoder_request for r in trace.requests()}[request]
    assert source is not None
    ids: dict[int, list[int]]
    ids = {n: trace.tokens(n)["token_id"].to_pylist() for n in (source, request)}
    for layer, expected in enumerate(own_maps(model, ids[source], ids[request])):
        reader = source if layer in ENCODER else request
        for head in range(len(expected)):
            found = trace.attention(layer, head, request=reader)
            np.testing.assert_allclose(found, expected[head], atol=1e-5)
    return ids[source], ids[request]


def recorded(path: Path, model: Any, run: Any, named: bool = True) -> tuple[Any, kvtrace.Trace]:
    """Run without and with a recorder, assert the same bits, and open the trace."""
    plain = run()
    with record(model if named else None, path, dtype="float32", strict=True) as recording:
        found = run()
    assert recording.gaps == {}
    assert torch.equal(plain.sequences, found.sequences)
    for one, other in zip(plain.logits, found.logits, strict=True):
        assert torch.equal(one, other)
    return found, kvtrace.open(path)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", [BartForConditionalGeneration, MarianMTModel])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_generation_is_recorded_whole(kernel: str, kind: Any, named: bool, tmp_path: Path) -> None:
    model = build(kind, kernel)
    ids, mask = texts()
    found, trace = recorded(
        tmp_path / "a.kvtrace", model, lambda: generate(model, ids, mask), named
    )
    pairs = [(r.request, r.tokens, r.encoder_request) for r in trace.requests()]
    assert pairs == [(0, 11, None), (1, 8, None), (2, NEW, 0), (3, NEW, 1)]
    for row, length in ((0, 11), (1, 8)):
        source, decoded = check(trace, model, 2 + row)
        assert source == ids[row, :length].tolist()
        assert decoded == found.sequences[row, :-1].tolist()
    kinds = {spec.layer: spec.attention_kind for spec in trace.layers}
    assert kinds == {
        **dict.fromkeys(ENCODER, "bidirectional"),
        **dict.fromkeys(DECODER, "full"),
        **dict.fromkeys(CROSS, "cross"),
    }
    assert trace.layers[5].name == "model.decoder.layers.0.encoder_attn"
    assert trace.table("models").num_rows == 1
    assert trace.signals >= {"q", "k", "v", "lse"}


@pytest.mark.writer_process
def test_rows_hold_what_is_theirs(tmp_path: Path) -> None:
    model = build()
    _, trace = recorded(tmp_path / "a.kvtrace", model, lambda: generate(model, *texts()))
    assert trace.rows == 11 + 8 + 2 * NEW
    assert [spec.layer for spec in trace.layers_of(0)] == list(ENCODER)
    assert [spec.layer for spec in trace.layers_of(2)] == [*DECODER, *CROSS]
    data = trace.layer_data(CROSS[0], 2)
    for values, count in ((data.q, NEW), (data.k, 11), (data.v, 11), (data.lse, NEW)):
        assert values is not None
        assert len(values) == count
        assert np.isfinite(values).all()
    some = trace.attention(CROSS[0], 1, rows=slice(2, 4), keys=np.array([0, 10]), request=2)
    np.testing.assert_array_equal(some, trace.attention(CROSS[0], 1, request=2)[2:4][:, [0, 10]])
    with pytest.raises(InputError, match=r"layer 3 was not found in request 0 .* it has 0-2"):
        trace.attention(DECODER[0], 0, request=0)
    with pytest.raises(InputError, match=r"layer 0 was not found in request 2 .* it has 3-6"):
        trace.attention(ENCODER[0], 0, request=2)


def test_memory_of_both_caches_is_an_event_of_its_layer(tmp_path: Path) -> None:
    model = build()
    _, trace = recorded(tmp_path / "a.kvtrace", model, lambda: generate(model, *texts()))
    grown = trace.sql(
        "select layer, count(*) n, max(tokens) tokens, max(bytes) bytes from kv_events"
        " where event = 'grow' group by layer order by layer"
    ).to_pylist()
    # Two rows, keys and values, 48 numbers of four bytes a token; padding of the texts counts.
    own = {"n": NEW, "tokens": NEW, "bytes": 2 * 2 * NEW * 48 * 4}
    cross = {"n": 1, "tokens": 11, "bytes": 2 * 2 * 11 * 48 * 4}
    want = [{"layer": n, **own} for n in DECODER] + [{"layer": n, **cross} for n in CROSS]
    assert grown == want


def test_beams_read_one_encoder_request(tmp_path: Path) -> None:
    model = build()
    ids, mask = texts()
    found, trace = recorded(
        tmp_path / "a.kvtrace", model, lambda: generate(model, ids, mask, num_beams=3)
    )
    sources = [r.encoder_request for r in trace.requests()]
    assert sources == [None, None, 0, 0, 0, 1, 1, 1]
    ends = [check(trace, model, request)[1] for request in range(2, 8)]
    assert found.sequences[0, :-1].tolist() in ends[:3]
    assert found.sequences[1, :-1].tolist() in ends[3:]
    assert trace.table("forks").num_rows


def test_a_forward_pass_with_labels_and_its_gradients(tmp_path: Path) -> None:
    model = build().train()
    ids, mask = texts()
    labels = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(4))

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        return model.model.shared.weight.grad.clone()  # type: ignore[no-any-return]

    plain = gradient()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        assert torch.equal(gradient(), plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [r.tokens for r in trace.requests()] == [11, 8, 5, 5]
    assert [r.encoder_request for r in trace.requests()] == [None, None, 0, 1]
    assert trace.tokens(2)["token_id"].to_pylist() == [2, *labels[0, :-1].tolist()]


def test_an_encoder_may_be_read_again_or_by_nobody(tmp_path: Path) -> None:
    model = build()
    ids, _ = texts()
    recording = record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True)
    with recording, torch.no_grad():
        encoded = model.get_encoder()(ids[:1])
        for start in (2, 3):
            model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[start, 5, 6]]))
        model.get_encoder()(ids[:1, :4])
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [(r.tokens, r.encoder_request) for r in trace.requests()] == [
        (11, None),
        (3, 0),
        (3, 0),
        (4, None),
    ]
    assert check(trace, model, 1)[1] == [2, 5, 6]
    assert check(trace, model, 2)[1] == [3, 5, 6]


def test_what_is_not_the_encoders_output_is_a_gap(tmp_path: Path) -> None:
    model = build()
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording, torch.no_grad():
        model(encoder_outputs=(torch.ones(1, 4, 48),), decoder_input_ids=torch.tensor([[2, 5]]))
    assert recording.gaps == {"the decoder read an encoder's output that was not recorded": 2}


def build_t5(kind: Any = T5ForConditionalGeneration, configuration: Any = T5Config) -> Any:
    """Tiny, of random weights; its bias ends at a distance of 12."""
    torch.manual_seed(1)
    config = configuration(
        vocab_size=40,
        d_model=32,
        d_kv=8,
        num_heads=4,
        num_layers=3,
        num_decoder_layers=2,
        d_ff=32,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        eos_token_id=None,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_(generator=torch.Generator().manual_seed(4))
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("kind", "configuration"),
    [(T5ForConditionalGeneration, T5Config), (UMT5ForConditionalGeneration, UMT5Config)],
)
def test_a_learned_position_bias_is_part_of_the_layer(
    kind: Any, configuration: Any, beams: int, tmp_path: Path
) -> None:
    model = build_t5(kind, configuration)
    ids = torch.randint(3, 40, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, 15:], mask[1, 15:] = 0, 0
    found, trace = recorded(
        tmp_path / "a.kvtrace",
        model,
        lambda: generate(model, ids, mask, num_beams=beams, min_new_tokens=NEW),
    )
    ends = [check(trace, model, request)[1] for request in range(2, 2 + 2 * beams)]
    assert found.sequences[0, :-1].tolist() in ends
    biases = {spec.layer: spec.position_bias for spec in trace.layers}
    assert all(biases[n] is None for n in CROSS)
    own = biases[DECODER[1]]
    assert own is not None
    assert (len(own), len(own[0])) == (4, 25)
    with pytest.raises(InputError, match="a learned position bias"):
        replay(trace, ["lru"], ["50%"], requests=[2], store=False)


def test_chosen_heads_keep_their_bias(tmp_path: Path) -> None:
    model = build_t5()
    ids = torch.randint(3, 40, (1, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    paths = [tmp_path / "all.kvtrace", tmp_path / "one.kvtrace"]
    for path, heads in zip(paths, (None, "2"), strict=True):
        with record(model, path, dtype="float32", heads=heads, strict=True) as recording:
            generate(model, ids, mask)
        assert recording.gaps == {}
    whole, one = (kvtrace.open(path) for path in paths)
    for layer, request in ((0, 0), (4, 1), (6, 1)):
        expected = whole.attention(layer, 2, request=request)
        np.testing.assert_allclose(one.attention(layer, 2, request=request), expected, atol=1e-6)


def test_a_bias_that_nothing_explains_is_a_gap(tmp_path: Path) -> None:
    model = build_t5()
    first = model.encoder.block[0].layer[0].SelfAttention
    original = first.compute_bias
    first.compute_bias = lambda *args, **kwargs: original(*args, **kwargs) + 1
    ids = torch.randint(3, 40, (1, 5), generator=torch.Generator().manual_seed(2))
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        generate(model, ids, torch.ones_like(ids))
    assert "layer 0 adds another position bias than it learned" in recording.gaps
    assert kvtrace.open(tmp_path / "a.kvtrace").rows == 0


@pytest.mark.writer_process
def test_waiting_for_a_decoder_never_stops_the_model(tmp_path: Path) -> None:
    model = build()
    ids = torch.randint(3, 40, (4, 30), generator=torch.Generator().manual_seed(2))
    labels = ids[:, :25].contiguous()
    # The rows of one encoder's layer are more than the queue takes.
    recording = record(
        model, tmp_path / "a.kvtrace", strict=True, on_full="wait", queue_bytes=10_000
    )
    with recording, torch.no_grad():
        for _ in range(2):
            model(ids, labels=labels)
            model.get_encoder()(ids)
    assert recording.gaps == {}
    assert recording.rows == 2 * 4 * (30 + 25 + 30)


def test_an_encoder_of_sound_has_tokens_without_ids(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = WhisperConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
    )
    model = WhisperForConditionalGeneration(config).eval()
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[2, 5, 6], [2, 7, 8]])
    with torch.no_grad():
        plain = model(sound, decoder_input_ids=ids).logits
        with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
            assert torch.equal(model(sound, decoder_input_ids=ids).logits, plain)
        model.set_attn_implementation("eager")
        own = model(sound, decoder_input_ids=ids, output_attentions=True)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [(r.tokens, r.encoder_request) for r in trace.requests()] == [
        (20, None),
        (20, None),
        (3, 0),
        (3, 1),
    ]
    assert trace.tokens(0)["token_id"].to_pylist() == [None] * 20
    for layer, request, maps in (
        (1, 1, own.encoder_attentions[1]),
        (2, 3, own.decoder_attentions[0]),
        (3, 3, own.cross_attentions[0]),
    ):
        found = trace.attention(layer, 2, request=request)
        np.testing.assert_allclose(found, maps[1, 2].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"detail": "summary"}, set()),
        ({"detail": "qk"}, {"q", "k", "lse"}),
        ({"layers": "0,3,5"}, {"q", "k", "v", "lse"}),
    ],
)
def test_less_detail_is_kept_of_both_halves(
    options: dict[str, Any], kept: set[str], tmp_path: Path
) -> None:
    model = build()
    with record(model, tmp_path / "a.kvtrace", strict=True, **options) as recording:
        generate(model, *texts())
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.signals & {"q", "k", "v", "lse"} == kept
    assert [r.encoder_request for r in trace.requests()] == [None, None, 0, 1]
    if kept:
        assert trace.attention(CROSS[0], 1, request=3).shape == (NEW, 8)
