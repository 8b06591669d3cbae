"""What a distributed launcher tells its processes: torchrun, accelerate, and their like."""

from __future__ import annotations

import os

#: What all processes of a launch share, and those of the next launch do not.
_LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def environment_rank() -> int | None:
    """Number of this process among those of its launch; None where it is alone."""
    if _number("WORLD_SIZE", 1) < 2:
        return None
    found = _number("RANK", _number("LOCAL_RANK", -1))
    return found if found >= 0 else None


def environment_launch() -> str | None:
    """What the processes of this launch have in common; None where this one is alone."""
    if environment_rank() is None:
        return None
    parts = [os.environ.get(name, "") for name in _LAUNCH]
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # All on one machine, all started by one process; two launches may share a port in turn.
        parts.append(str(os.getppid()))
    return " ".join(parts)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
