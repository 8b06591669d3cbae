"""Sequence numbers: what is missing, what came twice, and when a publisher began anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Source(NamedTuple):
    """One publisher: it numbers its messages from 0, and its blocks are its own."""

    topic: str
    rank: int | None


@dataclass(frozen=True)
class Verdict:
    """What a message's sequence number says.

    Attributes
    ----------
    missing : range
        Sequence numbers that should have come before it.
    duplicate : bool
        It was there before.
    restarted : bool
        Its publisher began again from 0.
    """

    missing: range = range(0)
    duplicate: bool = False
    restarted: bool = False


class SequenceWatch:
    """Knows the next sequence number of every source."""

    def __init__(self) -> None:
        self._next: dict[Source, int] = {}
        self._last_ns: dict[Source, int] = {}

    def expected(self, source: Source) -> int:
        """The sequence number that should come next."""
        return self._next.get(source, 0)

    def judge(self, source: Source, sequence: int, ts_ns: int | None) -> Verdict:
        """Compare a message with what was accepted so far; changes nothing."""
        expected = self.expected(source)
        if sequence >= expected:
            return Verdict(missing=range(expected, sequence))
        # A low number is an old message again, unless it is younger than all that came before.
        if ts_ns is not None and ts_ns > self._last_ns.get(source, ts_ns):
            return Verdict(missing=range(sequence), restarted=True)
        return Verdict(duplicate=True)

    def accept(self, source: Source, sequence: int, ts_ns: int | None) -> None:
        """Go on behind this message."""
        self._next[source] = sequence + 1
        if ts_ns is not None:
            self._last_ns[source] = ts_ns
