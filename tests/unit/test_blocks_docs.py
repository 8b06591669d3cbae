"""docs/blocks.md: its commands and code run, and it names every policy, mode and importer."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from tests.support.blocks import REFERENCE

import kvtrace
import kvtrace.cli
from kvtrace_recorder.importers import FORMATS
from kvtrace_viewer.blocks import POLICIES
from kvtrace_viewer.blocks.accounting import MODES
from kvtrace_viewer.blocks.offload import EXPORTS

PAGE = (Path(__file__).parents[2] / "docs/blocks.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_it_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(REFERENCE / "sessions_a.jsonl", "conversation_trace.jsonl")
    curve, policy, contract = blocks("python")
    Path("mru.py").write_text(policy)
    for line in (line for block in blocks("sh") for line in block.splitlines()):
        assert line.startswith("kvtrace ")
        assert kvtrace.cli.main(shlex.split(line)[1:]) == 0, line
    assert "mru.py:MRU:spared=4" in capsys.readouterr().out
    assert "class SievePolicy" in Path("sieve_policy.py").read_text()
    exec(compile(curve, "blocks.md", "exec"), {})  # noqa: S102
    space: dict[str, type] = {}
    exec(compile(contract, "blocks.md", "exec"), space)  # noqa: S102
    space["TestMRU"]().test_nothing_beats_belady()
    (question,) = blocks("sql")
    found = kvtrace.open("conversation.kvtrace").sql(question)
    assert found.column_names == ["block_index", "accesses", "blocks"]
    assert found["accesses"][0].as_py() == 1500


def test_it_names_everything() -> None:
    for name in POLICIES:
        assert f"| `{name}` |" in PAGE, name
    for mode, values in MODES.items():
        for value in values:
            assert f"`--{mode} {value}`" in PAGE
    for name in set(FORMATS) - {"qkv-npz"}:
        assert f"kvtrace import {name} " in PAGE, name
    assert "(lru, fifo, clock, lfu, sieve or s3fifo)" in PAGE
    assert list(EXPORTS) == ["lru", "fifo", "clock", "lfu", "sieve", "s3fifo"]
