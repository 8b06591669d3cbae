"""The self-check: outputs recomputed from the trace agree with the model's, and mistakes show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import tiny
from tests.support.tiny import SHARP, SIZES
from transformers import Gemma2Config, Gemma2ForCausalLM

import kvtrace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace_recorder import record
from kvtrace_recorder.taps import operands

NEW = 6


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


def llama() -> Any:
    return tiny.llama(**SHARP)


def run(model: Any, path: Path, **options: Any) -> list[dict[str, Any]]:
    """Generate from two prompts, one padded; what the self-check found."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (2, 40), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with record(model, path, verify=True, progress=False, **options):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
    found: list[dict[str, Any]] = kvtrace.open(path).table("verifications").to_pylist()
    return found


def test_a_float32_trace_agrees_to_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.kvtrace"
    found = run(llama(), path, dtype="float32")
    assert [row["layer"] for row in found] == [0, 1]
    # The prefill and decode steps 1, 2 and 4: three rows of one, and one each.
    assert [row["rows"] for row in found] == [6, 6]
    assert max(row["max_error"] for row in found) < 1e-5
    assert main(["info", str(path)]) == 0
    assert "verified  attention outputs of 12 rows" in capsys.readouterr().out
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == found


@pytest.mark.writer_process
def test_float16_chosen_heads_and_softcaps_with_windows(tmp_path: Path) -> None:
    torch.manual_seed(1)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, **SHARP, sliding_window=16)).eval()
    found = run(gemma, tmp_path / "a.kvtrace", heads="1", queries="last=9")
    assert [row["rows"] for row in found] == [6, 6]
    assert 1e-6 < max(row["max_error"] for row in found) < 1e-2


def test_a_wrong_scale_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = operands._describe_layer

    def wrong(*args: Any) -> Any:
        spec = right(*args)
        return replace(spec, scale=spec.scale * 1.5) if spec.layer == 1 else spec

    monkeypatch.setattr(operands, "_describe_layer", wrong)
    errors = [row["max_error"] for row in run(llama(), tmp_path / "a.kvtrace", dtype="float32")]
    assert errors[0] < 1e-5
    assert errors[1] > 0.05


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outputs are recomputed from q, k and v"):
        record(llama(), tmp_path / "a.kvtrace", detail="qk", verify=True)
    path = tmp_path / "full.kvtrace"
    assert run(llama(), path, max_bytes=1000) == []
    reasons = kvtrace.open(path).table("gaps")["reason"].to_pylist()
    assert any(reason.startswith("the trace holds its max_bytes") for reason in reasons)
