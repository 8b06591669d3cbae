"""kvtrace import qkv-npz; the reference file was made by an independent library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
import kvtrace.cli
from kvtrace.testing import log_sum_exp

REFERENCE = Path(__file__).parents[1] / "reference" / "kvpress_a.npz"


def synthetic(**replaced: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"ids": np.arange(10, 22)}
    for layer in range(2):
        for kind, heads in (("q", 4), ("k", 2), ("v", 2)):
            arrays[f"{kind}{layer}"] = rng.normal(size=(heads, 12, 8)).astype(np.float16)
    arrays |= replaced
    return {name: value for name, value in arrays.items() if value is not None}


def run(*words: str | Path) -> int:
    return kvtrace.cli.main(["import", "qkv-npz", *map(str, words)])


def test_the_reference_comes_in_whole(tmp_path: Path) -> None:
    out = tmp_path / "a.kvtrace"
    assert run(REFERENCE, "--out", out) == 0
    trace = kvtrace.open(out)
    file = np.load(REFERENCE)
    (request,) = trace.requests()
    assert (trace.status, trace.manifest.source) == ("complete", "imported")
    assert (request.tokens, request.prompt_tokens) == (216, 192)
    assert trace.signals >= {"q", "k", "v", "lse", "wo", "q_prerope"}
    assert trace.tokens(0)["token_id"].to_pylist() == file["ids"].tolist()
    for layer in range(4):
        data = trace.layer_data(layer)
        assert data.q is not None
        assert data.k is not None
        assert data.lse is not None
        expected: Any = log_sum_exp(data.q, data.k, data.spec)
        for kind in ("q", "k", "v"):
            np.testing.assert_array_equal(
                getattr(data, kind), file[f"{kind}{layer}"].transpose(1, 0, 2)
            )
        np.testing.assert_allclose(data.lse, expected, atol=2e-6)
        before_rope = file[f"q_prerope{layer}"].transpose(1, 0, 2)
        np.testing.assert_array_equal(trace.row_array("q_prerope", layer), before_rope)
    np.testing.assert_array_equal(trace.static("wo"), file["wo"])
    np.testing.assert_allclose(trace.attention(2, 5).sum(axis=1), 1, atol=1e-5)
    phases = trace.sql("select phase, count(*) n from steps group by phase order by phase")
    assert phases.to_pylist() == [{"phase": "decode", "n": 24}, {"phase": "prefill", "n": 1}]


def test_float16_stays_float16_and_all_tokens_are_the_prompt(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **synthetic())
    assert run(tmp_path / "a.npz", "--out", tmp_path / "a.kvtrace") == 0
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.table("runs")["dtype"].to_pylist() == ["float16"]
    assert trace.requests()[0].prompt_tokens == 12


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ids": None}, "has no array ids; the token ids [token] were expected"),
    ({"ids": np.arange(9)}, "q0 of {file} has shape [4, 12, 8]; [head, 9 tokens as in ids"),
    ({"ids": np.ones(12)}, "ids of {file} has shape [12] of float64; [token] of integers"),
    ({"v1": None}, "has no array v1; 2 layers each with q, k, v were expected"),
    ({"q0": None}, "has queries of layers [1]; q0, q1, ... without holes were expected"),
    ({"k1": np.ones((3, 12, 8), np.float16)}, "and q heads a multiple of k and v heads was"),
    ({"k1": np.ones((2, 12, 8), np.float32)}, "float16 as in q0 was expected"),
    ({"q0": np.ones((4, 12, 8))}, "has type float64; float16 or float32 was expected"),
    ({"wo": np.ones((2, 5, 31))}, "[2 layers, hidden, q_head * head_dim = [32]] was expected"),
    ({"score0": np.ones((2, 11))}, "[2 kv heads, 12 tokens] of numbers, in every layer was"),
    ({"prompt_tokens": np.array(13)}, "prompt_tokens of {file} has 13; 1 to 12 was expected"),
]


@pytest.mark.parametrize(("replaced", "message"), BAD)
def test_wrong_files_are_refused_in_one_line(
    replaced: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **synthetic(**replaced))
    assert run(file, "--out", tmp_path / "a.kvtrace") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.format(file=file) in error
    # A file that cannot be imported must not stand in the way of the next try.
    np.savez(file, **synthetic())
    assert run(file, "--out", tmp_path / "a.kvtrace") == 0


def test_what_is_no_npz_and_what_exists_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello")
    assert run(text, "--out", tmp_path / "a.kvtrace") == 1
    assert "is no .npz file" in capsys.readouterr().err
    assert run(tmp_path / "none.npz", "--out", tmp_path / "a.kvtrace") == 1
    assert "does not exist" in capsys.readouterr().err
    np.savez(tmp_path / "a.npz", **synthetic())
    assert run(tmp_path / "a.npz", "--out", tmp_path) == 1
    assert "is not a trace" in capsys.readouterr().err
    assert run(tmp_path / "a.npz", "--out", tmp_path / "a.kvtrace") == 0
    assert run(tmp_path / "a.npz", "--out", tmp_path / "a.kvtrace") == 1
    assert "--force" in capsys.readouterr().err
    assert run(tmp_path / "a.npz", "--out", tmp_path / "a.kvtrace", "--force") == 0


def test_formats_that_are_not_there_are_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert kvtrace.cli.main(["import", "csv", "x", "--out", "y"]) == 2
    assert "choose from" in capsys.readouterr().err
