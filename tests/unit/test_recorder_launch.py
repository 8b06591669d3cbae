from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from kvtrace.errors import InputError
from kvtrace_recorder.imports import AfterImport
from kvtrace_recorder.launch import Outcome, Program, parse_program, run_program


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "work.py"


def run(script: Path, *arguments: str) -> Outcome:
    return run_program(Program("script", str(script), arguments))


def test_commands_are_recognised(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.touch()
    expected = Program("script", str(script), ("--x", "1"))
    assert parse_program([str(script), "--x", "1"]) == expected
    assert parse_program([sys.executable, str(script), "--x", "1"]) == expected
    assert parse_program(["-m", "json.tool", "-h"]) == Program("module", "json.tool", ("-h",))
    assert parse_program([sys.executable, "-m", "json.tool"]) == Program("module", "json.tool", ())
    # Options of the interpreter need a process of their own.
    assert parse_program([sys.executable, "-O", str(script)]) is None
    assert parse_program(["torchrun", str(script)]) is None
    assert Program("module", "json.tool", ()).name == "tool"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no program"),
        (["no/such.py"], "no/such.py does not exist"),
        (["-m"], "without a module"),
    ],
)
def test_bad_commands_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_program(words)


def test_a_script_runs_as_main(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (script.parent / "beside.py").write_text("WHERE = __file__")
    script.write_text(
        "import sys, beside\n"
        "import __main__\n"
        "print(__name__, __main__.__file__ == __file__, sys.argv, sys.path[0], beside.WHERE)\n"
    )
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    assert run(script, "a", "-b") == Outcome(0, finished=True)
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before
    sys.modules.pop("beside")
    folder = script.parent
    assert capsys.readouterr().out.split(" ", 2) == [
        "__main__",
        "True",
        f"{[str(script), 'a', '-b']} {folder} {folder / 'beside.py'}\n",
    ]


@pytest.mark.parametrize(
    ("body", "status", "finished"),
    [
        ("pass", 0, True),
        ("import sys; sys.exit()", 0, True),
        ("import sys; sys.exit(7)", 7, True),
        ("import sys; sys.exit('no good')", 1, True),
        ("raise ValueError('boom')", 1, False),
        ("raise KeyboardInterrupt", 130, False),
        ("def broken(:", 1, False),
    ],
)
def test_exit_statuses_are_kept(body: str, status: int, finished: bool, script: Path) -> None:
    script.write_text(body)
    assert run(script) == Outcome(status, finished)


def test_a_traceback_shows_the_script_only(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text("def inner():\n    raise ValueError('boom')\ninner()\n")
    run(script)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{script}", line 3, in <module>'
    assert lines[-1] == "ValueError: boom"
    assert not any("kvtrace" in line for line in lines)


def test_threads_of_a_script_are_waited_for(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(
        "import threading, time\n"
        "def late():\n    time.sleep(0.1)\n    print('late')\n"
        "threading.Thread(target=late).start()\n"
    )
    assert run(script).status == 0
    assert capsys.readouterr().out == "late\n"


def test_a_callback_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvtrace_test_late.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []

    def done() -> None:
        seen.append(sys.modules["kvtrace_test_late"].VALUE)

    waiting = AfterImport("kvtrace_test_late", done)
    waiting.install()
    assert seen == []
    module = importlib.import_module("kvtrace_test_late")
    assert seen == [3]
    assert waiting not in sys.meta_path
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    AfterImport("kvtrace_test_late", done).install()
    assert seen == [3, 3]
    del sys.modules["kvtrace_test_late"]


def test_a_callback_that_is_no_longer_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvtrace_test_never.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    waiting = AfterImport("kvtrace_test_never", lambda: pytest.fail("called"))
    waiting.install()
    waiting.remove()
    importlib.import_module("kvtrace_test_never")
    del sys.modules["kvtrace_test_never"]
