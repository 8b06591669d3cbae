from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from kvtrace import cli
from kvtrace.testing import SyntheticTrace


def test_help_lists_every_verb_without_importing_torch_or_dash() -> None:
    code = (
        "import sys; from kvtrace.cli import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'dash', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for point in entry_points(group=cli.GROUP):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {point.name} ")]
        assert "not installed" not in line
        assert len(line.split()) > 3


@pytest.mark.parametrize("verb", sorted(point.name for point in entry_points(group=cli.GROUP)))
def test_every_verb_helps_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert f"kvtrace {verb}" in capsys.readouterr().out.split("options:")[0].split("\n", 1)[1]


def test_misuse_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["inof"]) == 2
    assert cli.main(["info"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_is_one_line_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", str(tmp_path / "nothing")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert "does not exist" in line


def test_a_missing_part_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'dash'", name="dash")

    point = EntryPoint("view", "kvtrace_viewer.commands.view", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])
    monkeypatch.setattr(cli, "import_module", absent)
    assert cli.main(["view"]) == 1
    assert "pip install 'kvtrace[viewer]'" in capsys.readouterr().err


def test_info_says_what_the_contract_asks(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace()
    assert cli.main(["info", str(trace.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format_version"] == "1.1"
    assert (found["rows"], found["requests"], found["layers"]) == (43, 1, 2)
    assert found["complete"] is True
    assert found["source"] == "synthetic"
    assert found["bytes"] > 0
    assert found["gaps"] == []
    assert {"policy", "exactness", "reason"} <= set(found["replayable"][0])
    assert cli.main(["info", str(trace.path)]) == 0
    assert "synthetic" in capsys.readouterr().out
