"""Who may ask, which traces are listed, and what the command refuses."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from kvtrace.errors import InputError, TraceError
from kvtrace.testing import SyntheticTrace
from kvtrace_viewer.commands import view
from kvtrace_viewer.library import TraceLibrary
from kvtrace_viewer.security import SameOriginOnly


async def nobody(*_given: object) -> None:
    """Stand for the application behind."""


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost", "[::1]:8050", "10.0.0.4", "gpu1"])
def test_addresses_and_the_given_name_are_answered(host: str) -> None:
    guard = SameOriginOnly(nobody, frozenset({"gpu1"}))
    assert guard.refusal(Headers({"host": host})) is None
    assert guard.refusal(Headers({"host": host, "origin": f"http://{host}"})) is None


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_rebound_names_are_refused(host: str) -> None:
    assert SameOriginOnly(nobody).refusal(Headers({"host": host})) is not None


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9999", "null"])
def test_requests_from_other_origins_are_refused(origin: str) -> None:
    headers = Headers({"host": "127.0.0.1:8050", "origin": origin})
    assert SameOriginOnly(nobody).refusal(headers) is not None


def test_ids_reach_nothing_outside_the_root(
    synthetic_trace: SyntheticTrace, tmp_path: Path
) -> None:
    synthetic_trace(name="outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.kvtrace").symlink_to(tmp_path / "outside.kvtrace")
    library = TraceLibrary(root)
    assert library.paths() == {}
    for trace_id in ("../outside.kvtrace", str(tmp_path / "outside.kvtrace"), "link.kvtrace", ""):
        with pytest.raises(TraceError, match="no trace named"):
            library.open(trace_id)


def test_a_broken_trace_is_listed_with_its_reason(
    synthetic_trace: SyntheticTrace, tmp_path: Path
) -> None:
    synthetic_trace(name="good")
    broken = tmp_path / "broken.kvtrace"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    entries = {entry.id: entry for entry in TraceLibrary(tmp_path).entries()}
    assert entries["good.kvtrace"].error is None
    assert entries["broken.kvtrace"].trace is None
    assert entries["broken.kvtrace"].error


def test_a_single_trace_is_a_library_of_one(
    synthetic_trace: SyntheticTrace, tmp_path: Path
) -> None:
    synthetic_trace(name="one")
    synthetic_trace(name="two")
    library = TraceLibrary(tmp_path / "one.kvtrace")
    assert list(library.paths()) == ["one.kvtrace"]
    assert library.default_id() == "one.kvtrace"


def test_a_trace_recorded_again_is_opened_again(
    synthetic_trace: SyntheticTrace, tmp_path: Path
) -> None:
    import shutil

    synthetic_trace([10], name="run")
    library = TraceLibrary(tmp_path)
    assert library.open("run.kvtrace").rows == 10
    shutil.rmtree(tmp_path / "run.kvtrace")
    synthetic_trace([12], name="run")
    assert library.open("run.kvtrace").rows == 12


def options(directory: Path, **given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    view.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([str(directory)])), **given})


def test_a_taken_port_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use; .*; .*--port"):
            view.run(options(tmp_path, port=port))


def test_addresses_that_cannot_be_served_on_are_told() -> None:
    with pytest.raises(InputError, match="port 70000 does not exist"):
        view.listen("127.0.0.1", 70000)
    with pytest.raises(InputError, match=r"192\.0\.2\.1 cannot be served on"):
        view.listen("192.0.2.1", 0)


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; .*kvtrace demo"):
        view.run(options(tmp_path / "nowhere"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="is a file"):
        view.run(options(file))


def test_addresses_are_told_apart() -> None:
    assert view.is_loopback("127.0.0.1")
    assert view.is_loopback("::1")
    assert view.is_loopback("localhost")
    assert not view.is_loopback("0.0.0.0")  # noqa: S104
    assert not view.is_loopback("gpu1")
    assert view.browsable("0.0.0.0") == "127.0.0.1"  # noqa: S104
    assert view.browsable("::1") == "[::1]"
