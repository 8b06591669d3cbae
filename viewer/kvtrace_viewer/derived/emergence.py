"""What attention turns to while a model is trained: one row for each recorded step, layer and head.

For traces of a training (`rec.sample`, `TraceCallback`, `kvtrace record --sample-every`), by the
definitions of docs/policies.md.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kvtrace.errors import InputError
from kvtrace.head_map import HeadMap
from kvtrace.head_sums import head_sums
from kvtrace.marks import marks_of, sink_distance
from kvtrace.trace import Trace

#: Columns behind training_step, layer and head, in the order of `_shares`.
_NAMES = ("first_token", "sinks", "sink_share", "heavy_hitters", "heavy_share")
_SQL = """
select min(steps.training_step) as training_step, rows.request
from rows join steps using (step)
where steps.training_step is not null
group by rows.request order by all
"""


def by_training_step(trace: Trace) -> pa.Table:
    """Sinks and heavy hitters of each head at each recorded step of a training.

    Parameters
    ----------
    trace : Trace
        With queries and keys.

    Returns
    -------
    pyarrow.Table
        training_step, layer, head; `first_token`: mean share of its attention that a query pays
        to position 0, over the queries more than 64 positions later; `sinks`, `heavy_hitters`:
        how many keys of a sequence are; `sink_share`, `heavy_share`: the share of all attention
        that they receive. Means over the sequences of the step.

    Raises
    ------
    InputError
        Where no step of a training was recorded.
    """
    found: dict[tuple[int, int, int], list[list[float]]] = {}
    models = {request.request: request.model for request in trace.requests()}
    for row in trace.sql(_SQL).to_pylist():
        for layer in (x for x in trace.layers if x.model == models.get(row["request"])):
            data = trace.layer_data(layer.layer, row["request"])
            for head in layer.q_head_numbers:
                key = (row["training_step"], layer.layer, head)
                found.setdefault(key, []).append(_shares(HeadMap(data, head)))
    if not found:
        raise InputError(
            f"{trace.path} holds no step of a training; one was expected; record with"
            " rec.sample(every=...), TraceCallback or kvtrace record --sample-every"
        )
    keys = dict(zip(("training_step", "layer", "head"), zip(*found, strict=True), strict=True))
    means = np.transpose([np.mean(values, axis=0) for values in found.values()])
    return pa.table(keys | dict(zip(_NAMES, means, strict=True)))


def _shares(head: HeadMap) -> list[float]:
    sums = head_sums(head, sink_distance(head.num_tokens)).keys
    total = max(float(sums.received.sum()), np.finfo(float).tiny)
    values = [float(sums.far[0] / max(1.0, sums.far_queries[0])) if head.num_keys else 0.0]
    marks = marks_of(sums)
    for kind in ("sink", "heavy"):
        positions = [mark.position for mark in marks if mark.kind == kind]
        values += [float(len(positions)), float(sums.received[positions].sum()) / total]
    return values
