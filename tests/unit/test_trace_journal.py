from __future__ import annotations

from pathlib import Path

import pytest

from kvtrace.errors import TraceError
from kvtrace.journal import JournalReader, JournalWriter


def write(path: Path, commits: int) -> list[int]:
    """Write `commits` lines; the file's length after each."""
    writer = JournalWriter(path)
    lengths = []
    for commit in range(commits):
        writer.append(commit * 10, {"rows": [f"{commit}"]}, closed=False, complete=False)
        lengths.append(path.stat().st_size)
    writer.close()
    return lengths


def test_a_journal_cut_at_any_byte_ends_at_its_last_whole_line(tmp_path: Path) -> None:
    lengths = write(tmp_path / "journal", 3)
    whole = (tmp_path / "journal").read_bytes()
    for cut in range(len(whole) + 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        state = JournalReader(tmp_path / "cut").state
        assert state.commits == sum(length <= cut for length in lengths)


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    lengths = write(tmp_path / "journal", 3)
    whole = bytearray((tmp_path / "journal").read_bytes())
    for at in range(lengths[0], lengths[1]):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(TraceError, match="line 2"):
            JournalReader(tmp_path / "damaged")


def test_refresh_reads_on_from_where_it_was(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal")
    writer.append(1, {"rows": ["a"]}, closed=False, complete=False)
    reader = JournalReader(tmp_path / "journal")
    writer.append(2, {"rows": ["b"]}, closed=True, complete=True)
    writer.close()
    state = reader.refresh()
    assert (state.commits, state.rows, state.closed) == (2, 2, True)
    assert state.segments == {"rows": ["a", "b"]}


def test_the_lock_tells_a_living_writer_from_a_dead_one(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal")
    reader = JournalReader(tmp_path / "journal")
    assert reader.writer_alive()
    writer.close()
    assert not reader.writer_alive()


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="journal is missing"):
        JournalReader(tmp_path / "journal")
