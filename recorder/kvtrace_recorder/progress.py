"""One line on standard error while recording."""

from __future__ import annotations

import sys


class ProgressLine:
    """Rewrites one line in place; silent unless enabled."""

    def __init__(self, enabled: bool) -> None:
        self.is_enabled = enabled
        self._shown = ""

    def show(self, line: str) -> None:
        """Show this instead of what stands there."""
        if self.is_enabled and line != self._shown:
            sys.stderr.write(f"\r{line}\x1b[K")
            sys.stderr.flush()
            self._shown = line

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = ""
