"""KV memory by arithmetic: to the byte what the recorder saw allocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.integration.test_recorder_families import FAMILIES, NEW, PROMPT, build, greedy, prompt

import kvtrace
from kvtrace import InputError
from kvtrace.cli import main
from kvtrace_recorder import record
from kvtrace_viewer.memory import read_model

#: One of every way to share, window or compress heads.
SHAPES = [
    "Llama",
    "Qwen2",
    "Qwen3",
    "Mistral",
    "Gemma2",
    "Gemma3",
    "GPT2",
    "GPTNeoX",
    "Phi",
    "Mixtral",
    "GptOss",
    "DeepseekV3",
    "Bloom",
    "Mpt",
    "Falcon",
]


@pytest.mark.usefixtures("one_thread", "writer_thread")
@pytest.mark.parametrize("family", SHAPES)
def test_the_arithmetic_is_what_was_allocated(family: str, tmp_path: Path) -> None:
    model = build(family, "eager")
    path = tmp_path / "a.kvtrace"
    with record(model, path, detail="events", strict=True):
        greedy(model, prompt())
    held = kvtrace.open(path).sql(
        "select sum(bytes) as bytes from (select layer, last(bytes order by ts_ns) as bytes"
        " from kv_events where event <> 'free' group by layer)"
    )
    # The last sampled token is never fed to the model.
    found = read_model(str(path))
    assert held["bytes"].to_pylist() == [found.cache_bytes(PROMPT + NEW - 1)]
    assert len(found.layers) == 2


@pytest.mark.parametrize(
    ("name", "kib"),
    [
        ("llama-3-8b", 128),
        ("llama-3-70b", 320),
        ("qwen2.5-7b", 56),
        ("qwen3-8b", 144),
        ("deepseek-v3", 68.625),
    ],
)
def test_known_models_have_their_published_bytes(name: str, kib: float) -> None:
    assert read_model(name).bytes_per_token == kib * 1024


def test_what_fits_is_the_largest_that_fits() -> None:
    model = read_model("llama-3-8b")
    for room in (1, 131_072, 10**9, 10**11):
        for batch in (1, 3):
            longest = model.largest_context(room, batch)
            assert longest is not None
            assert model.cache_bytes(longest, batch) <= room < model.cache_bytes(longest + 1, batch)
        most = model.largest_batch(room, 100)
        assert model.cache_bytes(100, most) <= room < model.cache_bytes(100, most + 1)
    assert read_model("llama-3-8b", "int4").cache_bytes(8) == model.cache_bytes(2)


def test_a_cache_of_windows_alone_stops_growing(tmp_path: Path) -> None:
    config = {**FAMILIES["Mistral"], "model_type": "mistral", "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(str(tmp_path))
    assert model.cache_bytes(8) == model.cache_bytes(10**6) == 2 * 8 * 2 * 2 * 12 * 4
    assert model.largest_context(10**5) is None
    assert model.largest_context(model.cache_bytes(8) - 1) == 7


def test_the_command_says_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "llama-3-8b", "--context", "32k", "--batch", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache_bytes"] == 32 << 30
    assert found["weight_bytes"] == 2 * 8030261248
    (h100,) = (row for row in found["fits"] if row["machine"] == "h100")
    assert h100["largest_batch"] == h100["room"] // (4 << 30)
    assert main(["memory", "llama-3-8b"]) == 0
    assert "largest context" in capsys.readouterr().out
    for wrong, said in (
        (["memory", "llama-9"], "llama-3-8b"),
        (["memory", "llama-3-8b", "--dtype", "int3"], "int3"),
        (["memory", "llama-3-8b", "--context", "many"], "32k"),
        (["memory", str(tmp_path)], "neither a model's directory nor a trace"),
    ):
        assert main(wrong) == 1
        assert said in capsys.readouterr().err


def test_a_configuration_without_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, said in (("{}", "none of num_hidden_layers"), ("[", "no JSON"), ("3", "no object")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            read_model(str(path))
