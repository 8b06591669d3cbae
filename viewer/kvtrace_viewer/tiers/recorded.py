"""What a recording itself says: its model, its steps and their times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.memory.model import DTYPES, ModelMemory, read_model
from kvtrace_viewer.tiers.residency import Longs
from kvtrace_viewer.tiers.run import ServedModel


@dataclass(frozen=True, eq=False)
class RecordedSteps:
    """The recorded forward passes in the order in which they began.

    Attributes
    ----------
    number, started_ns, duration_ns : int64 [step]
    phase : str [step]
    row, place : int64 [row]
        Rows, ascending, and the place of the step that processed each.
    """

    number: Longs
    started_ns: Longs
    duration_ns: Longs
    phase: NDArray[Any]
    row: Longs
    place: Longs

    def of_rows(self, rows: Longs) -> Longs:
        """Place of the step that processed each row: int64, as many."""
        return self.place[np.searchsorted(self.row, rows)]


def recorded_steps(trace: Trace) -> RecordedSteps:
    """Read them.

    Raises
    ------
    InputError
        Where the trace recorded no steps.
    """
    steps = trace.table("steps").sort_by([("started_ns", "ascending"), ("step", "ascending")])
    rows = trace.table("rows").select(["row", "step"]).sort_by("row")
    if not steps.num_rows or not rows.num_rows:
        raise InputError(
            f"{trace.path} recorded no step; a recorded run was expected; record one with kvtrace"
            " record"
        )
    number = steps["step"].to_numpy()
    order = np.argsort(number)
    of_row = rows["step"].to_numpy()
    return RecordedSteps(
        number=number,
        started_ns=pc.fill_null(steps["started_ns"], 0).to_numpy(),
        duration_ns=pc.fill_null(steps["duration_ns"], 0).to_numpy(),
        phase=np.array(steps["phase"].to_pylist(), dtype=object),
        row=rows["row"].to_numpy(),
        place=order[np.searchsorted(number[order], of_row)],
    )


def number_bytes(trace: Trace) -> tuple[float, str | None]:
    """Bytes of a number in the recorded cache, and what to know where the trace does not say."""
    try:
        return DTYPES[read_model(str(trace.path)).dtype], None
    except InputError:
        return 2.0, "the trace does not say the cache's type: 2 bytes a number are assumed"


def recorded_model(trace: Trace, own_pace: bool = True) -> ServedModel | None:
    """The model that a trace recorded; None where it recorded none, as an imported workload.

    Parameters
    ----------
    trace : Trace
        A trace of any kind.
    own_pace : bool
        Whether a prompt token takes what it took in the recorded prefill steps, rather than what
        the machine's FLOPS say.
    """
    if not any(row["config"] for row in trace.table("models").to_pylist()):
        return None
    memory = read_model(str(trace.path))
    name = str(trace.table("models")["name"][0].as_py() or memory.name)
    model = served(memory, name, _prefill_ns_per_token(trace) if own_pace else None)
    return replace(model, step_ns=_decode_step_ns(trace)) if own_pace else model


def served(memory: ModelMemory, name: str, ns_per_token: float | None = None) -> ServedModel:
    """A model as the tier replay needs it, from the arithmetic of its memory."""
    notes = []
    if any(layer.window for layer in memory.layers):
        notes.append(f"{name} has layers with a window; blocks are taken to hold all layers")
    if memory.parameters is None:
        notes.append(f"the parameters of {name} are not known: its weights take no room here")
    if ns_per_token is not None:
        notes.append(f"computing takes what it took when recorded: {ns_per_token:,.0f} ns a token")
    return ServedModel(
        name=name,
        kv_bytes_per_token=max(1, round(memory.bytes_per_token)),
        parameters=memory.parameters or 0,
        layers=max(1, len(memory.layers)),
        ns_per_token=ns_per_token,
        weight_bytes=memory.weight_bytes,
        notes=tuple(notes),
    )


def _prefill_ns_per_token(trace: Trace) -> float | None:
    steps = trace.table("steps")
    prefills = steps.filter(pc.equal(steps["phase"], "prefill"))
    tokens, took = (pc.sum(prefills[name]).as_py() for name in ("num_tokens", "duration_ns"))
    return took / tokens if tokens and took else None


def _decode_step_ns(trace: Trace) -> float | None:
    """Mean time of a recorded decode step, whatever its batch."""
    steps = trace.table("steps")
    found = pc.mean(steps.filter(pc.equal(steps["phase"], "decode"))["duration_ns"]).as_py()
    return None if found is None else float(found)


@dataclass(frozen=True)
class RecordedTimes:
    """How long the recorded run took.

    Attributes
    ----------
    ttft_s : float or None
        Mean time to the first token.
    tokens_per_s : float or None
        Decoded tokens by the time of their steps.
    """

    ttft_s: float | None
    tokens_per_s: float | None

    def to_json(self) -> dict[str, float | None]:
        """The times as plain values."""
        return {"ttft_s": self.ttft_s, "tokens_per_s": self.tokens_per_s}


def recorded_times(trace: Trace) -> RecordedTimes:
    """What view `request_latency` and table `steps` say of the recorded run."""
    if not trace.rows:
        return RecordedTimes(None, None)
    found = trace.sql(
        "select (select avg(time_to_first_token_ms) / 1e3 from request_latency) as ttft,"
        " (select sum(num_tokens) / nullif(sum(duration_ns), 0) * 1e9 from steps"
        " where phase = 'decode') as pace"
    ).to_pylist()[0]
    return RecordedTimes(found["ttft"], found["pace"])
