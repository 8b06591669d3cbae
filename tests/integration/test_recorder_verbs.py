"""kvtrace generate and kvtrace demo on the bundled model, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvtrace
import kvtrace.cli
from kvtrace_recorder import demo
from kvtrace_recorder.commands import demo as demo_verb

pytestmark = pytest.mark.skipif(
    not (demo.MODEL_DIR / "model.safetensors").exists(), reason="the bundled model is not here"
)


pytestmark = pytest.mark.usefixtures("one_thread")


def generate(*words: str | Path) -> int:
    return kvtrace.cli.main(["generate", *map(str, words)])


def test_generate_records_a_batch_of_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "A dictionary maps keys to values, and the keys of a"
    (tmp_path / "prompt.txt").write_text(long)
    out = tmp_path / "a.kvtrace"
    prompts = ["--prompt", "The list", "--prompt-file", str(tmp_path / "prompt.txt")]
    assert generate("demo", *prompts, "--max-new-tokens", "5", "--out", out) == 0
    shown = capsys.readouterr()
    assert [line[:4] for line in shown.out.splitlines() if line[:1] == "["] == ["[1] ", "[2] "]
    assert "kvtrace replay" in shown.err
    trace = kvtrace.open(out)
    _, tokenizer = demo.load()
    lengths = [len(tokenizer(text)["input_ids"]) for text in ("The list", long)]
    assert [r.prompt_tokens for r in trace.requests()] == lengths
    assert [r.tokens for r in trace.requests()] == [n + 4 for n in lengths]
    texts = trace.tokens(1)["text"].to_pylist()[1:]
    assert "".join(texts).startswith(long)
    assert trace.table("models")["name"].to_pylist() == ["demo/kvtrace-demo"]
    assert generate("demo", *prompts, "--out", out) == 1
    assert "--force" in capsys.readouterr().err


def test_sampling_is_seeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "The", "--sample", "--max-new-tokens", "8", "--detail", "events"]
    found = []
    for number, seed in enumerate(["1", "1", "2"]):
        assert generate("demo", *words, "--seed", seed, "--out", tmp_path / f"{number}") == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


BAD = [
    (["demo"], "no prompt, or an empty one"),
    (["demo", "--prompt", ""], "no prompt, or an empty one"),
    (["demo", "--prompt-file", "none.txt"], "none.txt cannot be read"),
    (["demo", "--prompt", "x", "--max-new-tokens", "0"], "numbers above 0 were expected"),
    (["./none", "--prompt", "x"], "./none is no directory"),
    (["none/none", "--prompt", "x"], "the model hub huggingface.co cannot be reached"),
    ([".", "--prompt", "x"], "could not be loaded"),
    (["demo", "--prompt", "x", "--attention", "nope"], "could not be loaded"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_what_cannot_be_run_is_one_line_and_leaves_nothing(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("kvtrace_recorder.commands.generate.getproxies", dict)
    monkeypatch.chdir(tmp_path)
    assert generate(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_the_demo_records_replays_and_replaces_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    original = kvtrace.cli.main

    def main(argv: list[str]) -> int:
        called.append(argv)
        return 0

    monkeypatch.setattr(demo_verb, "NEW_TOKENS", 6)
    for words in (["--no-view"], ["--port", "8051"]):
        monkeypatch.setattr(kvtrace.cli, "main", main)
        assert original(["demo", "--out", str(tmp_path), *words]) == 0
    trace = kvtrace.open(tmp_path / "demo.kvtrace")
    assert trace.status == "complete"
    (request,) = trace.requests()
    assert request.tokens == request.prompt_tokens + 5
    assert trace.table("gaps").num_rows == 0
    replays, view = called[:2], called[2]
    for argv in replays:
        assert argv[:2] == ["replay", str(tmp_path / "demo.kvtrace")]
        assert argv[-4:] == ["--budget", "25%", "--when", "step"]
        assert argv.count("--policy") == 6
    assert view == ["view", str(tmp_path), "--host", "127.0.0.1", "--port", "8051"]
