"""Answers that the browser saves as a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi.responses import Response


def file_response(content: bytes, name: str, media_type: str) -> Response:
    """Answer with a file of the given name."""
    safe = "".join(
        letter if letter.isascii() and letter.isprintable() and letter not in '"\\/' else "_"
        for letter in name
    )
    return Response(
        content,
        media_type=media_type,
        headers={"Content-Disposition": f'attachment; filename="{safe}"'},
    )


def csv_response(rows: Iterable[Sequence[Any]], name: str) -> Response:
    """Answer with rows as CSV, the first one the header."""
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return file_response(out.getvalue().encode(), name, "text/csv")
