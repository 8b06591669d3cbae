"""What several formats take."""

from __future__ import annotations

import argparse


def add_block_size(parser: argparse.ArgumentParser, default: int) -> None:
    """Declare --block-size, for files that a toolkit wrote with another one."""
    parser.add_argument(
        "--block-size",
        type=positive,
        default=default,
        metavar="N",
        help=f"tokens that a full block holds (default: {default})",
    )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
