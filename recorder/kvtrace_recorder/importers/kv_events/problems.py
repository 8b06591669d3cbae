"""What could not be read: counted by kind, with the first places named, as rows of `gaps`."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtrace.writer import TraceWriter

#: Places named of one kind of problem.
NAMED = 20


@dataclass
class _Kind:
    count: int = 0
    written: int = 0
    places: list[str] = field(default_factory=list)


class Problems:
    """Counts what could not be read.

    A stream may repeat one problem a million times, so a kind gets two rows of `gaps` at most: one
    when it is first met, which a killed import still has, and one for the rest at the end.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def note(self, what: str, reason: str, place: str | None = None) -> None:
        """Count one.

        Parameters
        ----------
        what : str
            What was lost: the `what` of the row in `gaps`.
        reason : str
            Why; of few different texts.
        place : str, optional
            Where, such as "line 7".
        """
        kind = self._kinds.setdefault((what, reason), _Kind())
        kind.count += 1
        if place is not None and len(kind.places) <= NAMED:
            kind.places.append(place)

    def write(self, writer: TraceWriter, *, final: bool = False) -> None:
        """Add the rows that are due."""
        for (what, reason), kind in self._kinds.items():
            new = kind.count - kind.written
            if new and (final or not kind.written):
                writer.add_gap(what, new, _with_places(reason, kind))
                kind.written = kind.count

    def lines(self) -> list[str]:
        """A line for every kind, for people."""
        return [
            f"{kind.count:,} {what} left out: {_with_places(reason, kind)}"
            for (what, reason), kind in self._kinds.items()
        ]


def _with_places(reason: str, kind: _Kind) -> str:
    if not kind.places:
        return reason
    more = ", ..." if len(kind.places) > NAMED else ""
    return f"{reason} ({', '.join(kind.places[:NAMED])}{more})"
