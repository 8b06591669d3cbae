"""A bundle is the trace, byte for byte, and nothing that is not."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvtrace
from kvtrace.bundle import CONTENTS, extract_bundle, write_bundle
from kvtrace.cli import main
from kvtrace.errors import InputError, TraceError
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.replay import replay

SPECS = [LayerSpec(layer, 4, 2, 8, 8, 8**-0.5) for layer in range(2)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> kvtrace.Trace:
    """A trace with a replay, and with trace.duckdb."""
    with TraceWriter(tmp_path_factory.mktemp("bundle") / "t.kvtrace", source="synthetic") as writer:
        write_synthetic(writer, SPECS, [40, 1, 1])
    trace = kvtrace.open(writer.path)
    replay(trace, ["h2o"], ["50%"])
    trace.sql("select 1")
    return trace


@pytest.fixture
def trace(original: kvtrace.Trace, tmp_path: Path) -> kvtrace.Trace:
    """A copy of it."""
    return kvtrace.open(shutil.copytree(original.path, tmp_path / "t.kvtrace"))


@pytest.fixture(scope="module")
def packed(original: kvtrace.Trace) -> Path:
    """Its bundle."""
    path = original.path.with_name("x.zip")
    write_bundle(original, path)
    return path


def files(root: Path) -> dict[str, bytes]:
    """Every file that is not derived."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "trace.duckdb"
    }


def test_it_replays_the_same_elsewhere(
    trace: kvtrace.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, out = tmp_path / "x.zip", tmp_path / "elsewhere" / "y.kvtrace"
    assert main(["bundle", str(trace.path), "--out", str(packed)]) == 0
    assert main(["bundle", str(packed), "--extract", str(out)]) == 0
    assert files(out) == files(trace.path)
    capsys.readouterr()
    command = ["--policy", "snapkv", "--policy", "oracle", "--budget", "8", "--json"]
    said = []
    for path in (trace.path, out):
        assert main(["replay", str(path), *command]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    for name in trace.replays()["replay"].to_pylist():
        stored = [kvtrace.open(p).replay(name).array("evicted_at") for p in (trace.path, out)]
        first, second = (array.read(0, array.shape[0]).tobytes() for array in stored)
        assert first == second
    assert kvtrace.open(out).sql("select count(*) n from rows")["n"].to_pylist() == [42]


def test_the_same_trace_makes_the_same_bytes(trace: kvtrace.Trace, tmp_path: Path) -> None:
    write_bundle(trace, tmp_path / "one.zip")
    # Other dates, another place, derived files built or not.
    copy = tmp_path / "copy" / trace.path.name
    shutil.copytree(trace.path, copy, copy_function=shutil.copy)
    (copy / "trace.duckdb").unlink()
    (copy / "cache").mkdir()
    (copy / "cache" / "thumbnail").write_text("derived")
    (copy / "replays" / ".half.tmp").mkdir()
    (copy / "replays" / ".half.tmp" / "journal").write_text("left by one that died")
    write_bundle(kvtrace.open(copy), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_any_zip_program_can_unpack_it(trace: kvtrace.Trace, tmp_path: Path) -> None:
    write_bundle(trace, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as packed:
        assert packed.testzip() is None
        packed.extractall(tmp_path / "by zipfile")
    found = kvtrace.open(tmp_path / "by zipfile" / trace.path.name)
    assert found.attention(1, 2).tolist() == trace.attention(1, 2).tolist()


def remade(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A bundle with changed entries."""
    with zipfile.ZipFile(source) as packed:
        found = {entry.filename: packed.read(entry) for entry in packed.infolist()}
    change(found)
    with zipfile.ZipFile(target, "w") as packed:
        for name, data in found.items():
            packed.writestr(name, data)
    return target


def renamed(entries: dict[str, bytes], old: str, new: str) -> None:
    """Rename a file in the list and in the zip."""
    contents: dict[str, Any] = json.loads(entries[CONTENTS])
    contents["files"][new] = contents["files"].pop(old)
    entries[CONTENTS] = json.dumps(contents).encode()
    folder = contents["trace"]
    entries[f"{folder}/{new}"] = entries.pop(f"{folder}/{old}")


def flip(entries: dict[str, bytes]) -> None:
    """Change one byte of a segment."""
    name = next(name for name in entries if name.endswith(".parquet"))
    data = bytearray(entries[name])
    data[len(data) // 2] ^= 1
    entries[name] = bytes(data)


def drop(entries: dict[str, bytes]) -> None:
    """Leave a file out."""
    del entries[next(name for name in entries if name.endswith(".parquet"))]


def longer(entries: dict[str, bytes]) -> None:
    """Let a file go on behind its listed end."""
    entries[next(name for name in entries if name.endswith("journal"))] += b"x" * (3 << 20)


def unlisted(entries: dict[str, bytes]) -> None:
    """Leave the list out."""
    del entries[CONTENTS]


DAMAGE: list[tuple[Callable[[dict[str, bytes]], None], str]] = [
    (flip, "is not what was packed"),
    (drop, "is missing"),
    (longer, "is not what was packed"),
    (lambda entries: entries.update({"stranger": b"x"}), "'stranger' is not in its list"),
    (unlisted, "no bundle.json of ours"),
    (lambda entries: entries.update({CONTENTS: b"[1]"}), "no bundle.json of ours"),
    (lambda entries: renamed(entries, "manifest.json", "other.json"), "there is no trace in it"),
    *(
        (lambda entries, name=name: renamed(entries, "manifest.json", name), "would leave")
        for name in ("../manifest.json", "/etc/manifest.json", "a/../../x", "C:x", "..\\x")
    ),
]


@pytest.mark.parametrize(("change", "said"), DAMAGE)
def test_a_changed_bundle_is_refused(
    packed: Path,
    tmp_path: Path,
    change: Callable[[dict[str, bytes]], None],
    said: str,
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    bad = remade(packed, tmp_path / "bad.zip", change)
    with pytest.raises(TraceError, match=said):
        extract_bundle(bad, inner / "out.kvtrace")
    # Nothing is left, neither inside nor beside.
    assert list(inner.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".json") == []


def test_what_cannot_be_packed(trace: kvtrace.Trace, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_text("mine")
    with pytest.raises(InputError, match="exists; a new path was expected"):
        write_bundle(trace, tmp_path / "x.zip")
    with pytest.raises(TraceError, match="cannot be used"):
        extract_bundle(tmp_path / "x.zip", tmp_path / "out")
    with pytest.raises(TraceError, match="cannot be used"):
        extract_bundle(tmp_path / "nothing.zip", tmp_path / "out")
    (trace.path / "rank-00000" / "link").symlink_to("/etc/hostname")
    with pytest.raises(TraceError, match="is a link"):
        write_bundle(trace, tmp_path / "y.zip")
    with TraceWriter(tmp_path / "live.kvtrace", source="synthetic") as writer:
        write_synthetic(writer, SPECS, [5])
        with pytest.raises(TraceError, match="is being recorded"):
            write_bundle(kvtrace.open(writer.path), tmp_path / "z.zip")
    assert not (tmp_path / "y.zip").exists()


def test_names_that_are_not_given(
    trace: kvtrace.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["bundle", str(trace.path)]) == 0
    assert main(["bundle", f"{trace.name}.zip"]) == 0
    assert kvtrace.open(f"{trace.name}.kvtrace").rows == trace.rows
    # Nothing is replaced unasked.
    assert main(["bundle", f"{trace.name}.zip"]) == 1
