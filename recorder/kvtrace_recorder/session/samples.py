"""The sample of attention outputs that `record(..., verify=True)` puts aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import Outputs, Sequenced
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.keep import of_heads


class OutputSamples:
    """Takes outputs of attention calls; compared with the trace at its end by `..verify`.

    Of each kind of step (prefill, decode, ...) the first is sampled, the second, the fourth and
    so on: in each all layers, and of one request its first, middle and last row with a query.
    That is a few copies of three rows in steps that become rare, and nothing in the others.

    Parameters
    ----------
    put : callable
        Takes the samples.
    """

    def __init__(self, put: Callable[[Outputs], None]) -> None:
        self._put = put
        self._seen: dict[str, int] = {}

    def take(self, step: ActiveStep, call: Call, output: Any) -> None:
        """Look at what an attention function returned."""
        if step.is_sampled is None:
            count = self._seen[step.record.phase] = self._seen.get(step.record.phase, 0) + 1
            step.is_sampled = count & (count - 1) == 0
        spec = step.model.specs.get(step.model.layer_of(call.module, call.nth))
        if not step.is_sampled or spec is None or spec.attention_kind == "cross":
            return
        values = output[0] if isinstance(output, tuple) else output
        group = call.q.shape[1] // call.k.shape[1]
        shape = (step.batch, step.length, call.k.shape[1] * group, spec.value_dim)
        if not isinstance(values, torch.Tensor) or values.shape != shape:
            # Of another form than transformers' attention functions give.
            return
        self._send(step, spec, values.detach())

    def _send(self, step: ActiveStep, spec: LayerSpec, values: torch.Tensor) -> None:
        sequences = [s for s in step.record.sequences if s.count]
        if not sequences:
            return
        sequence = sequences[self._seen[step.record.phase] % len(sequences)]
        rows, offsets = _rows_of(step, sequence)
        some = offsets[np.unique([0, len(offsets) // 2, len(offsets) - 1])] if len(offsets) else []
        if not len(some):
            return
        batch_row = 0 if step.is_packed else sequence.batch_index
        at = torch.from_numpy(rows[some]).to(values.device)
        chosen = values[batch_row].index_select(0, at)
        # As heads of a batch: [1, q_head, row, value_dim].
        kept = of_heads(chosen.transpose(0, 1)[None], spec, queries=True)[0].transpose(0, 1)
        positions = [int(sequence.position + offset) for offset in some]
        found = np.array(kept.float().cpu().numpy(), order="C")
        self._put(Outputs(spec.layer, sequence.request, positions, found))


def _rows_of(step: ActiveStep, sequence: Sequenced) -> tuple[Any, Any]:
    """Where a request's tokens stand in its batch row, and which of them keep their query."""
    before = 0
    for other in step.record.sequences:
        if other is sequence:
            break
        before += other.count
    kept = step.kept_queries[before : before + sequence.count]
    if step.is_packed:
        rows = np.arange(before, before + sequence.count)
    else:
        rows = np.flatnonzero(step.real[sequence.batch_index])
    return rows, np.flatnonzero(kept)
