"""One line on standard error while recording."""

from __future__ import annotations

import sys

from kvtrace.console import human_bytes


class ProgressLine:
    """Rewrites one line in place; silent unless enabled."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._shown = ""

    def show(self, tokens: int, written: int, queued: int) -> None:
        """Show tokens and bytes recorded, and bytes that wait for the writer."""
        if not self._enabled or not tokens:
            return
        line = f"kvtrace: {tokens:,} tokens, {human_bytes(written)}, {human_bytes(queued)} queued"
        if line != self._shown:
            sys.stderr.write(f"\r{line}\x1b[K")
            sys.stderr.flush()
            self._shown = line

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = ""
