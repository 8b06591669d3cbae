"""From a layer of a trace to the KV heads that are replayed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.holdings import Holdings
from kvtrace.model import LayerData, Request
from kvtrace_viewer.replay.block import Head
from kvtrace_viewer.replay.gaps import first_rows
from kvtrace_viewer.replay.signals import Extra


def as_held(data: LayerData, held: Holdings) -> LayerData:
    """One layer of one request, as far as `held` goes, with what was thinned made explicit.

    Queries that were not kept are zero (their rows are not measured), `received` is there only
    where it must stand for them, and values only where every token has them.
    """
    data = first_rows(data, len(held.queries))
    kinds = held.layers[data.spec.layer]
    v = data.v if "v" in kinds else None
    if held.has_all_queries or data.q is None:
        return replace(data, v=v, received=None)
    q = np.where(held.queries[:, None, None], data.q, np.float32(0))
    use = data.received if "received" in kinds else None
    return replace(data, q=q, v=v, received=None if use is None else np.nan_to_num(use))


def heads_of(
    data: LayerData, request: Request, num_layers: int, extra: Extra | None = None
) -> list[Head]:
    """One layer of one request as KV heads.

    Raises
    ------
    InputError
        Where keys or values of some rows are missing (a gap in the trace).
    """
    spec = data.spec
    if data.q is None or data.k is None:
        raise InputError(f"layer {spec.layer} has no q or k; both were expected; record them")
    for name, values in (("k", data.k), ("v", data.v)):
        missing = 0 if values is None else int((~np.isfinite(values)).any(axis=(1, 2)).sum())
        if missing:
            raise InputError(
                f"layer {spec.layer} of request {request.request} has {missing} rows without a "
                f"usable {name}; all were expected; see the gaps in `kvtrace info`"
            )
    extra = extra or Extra()
    group = spec.group_size
    slopes = None if spec.alibi_slopes is None else np.array(spec.alibi_slopes, np.float32)
    return [
        Head(
            q=data.q[:, h * group : (h + 1) * group],
            k=np.ascontiguousarray(data.k[:, h]),
            v=None if data.v is None else np.ascontiguousarray(data.v[:, h]),
            lse=_columns(data.lse, h * group, group),
            scale=spec.scale,
            prompt_tokens=min(request.prompt_tokens, data.n),
            window=spec.sliding_window,
            softcap=spec.softcap,
            alibi_slopes=None if slopes is None else slopes[h * group : (h + 1) * group],
            has_sinks=spec.has_sinks,
            received=_columns(data.received, h * group, group),
            layer=spec.layer,
            kv_head=number,
            num_layers=num_layers,
            q_prerope=_columns(extra.q_prerope, h * group, group),
            inv_freq=extra.inv_freq,
            wo=None if extra.wo is None else extra.wo[h * group : (h + 1) * group],
            score=None if extra.score is None else extra.score[: data.n, h],
        )
        for h, number in enumerate(spec.kv_head_numbers)
    ]


def _columns(values: NDArray[np.float32] | None, first: int, count: int) -> Any:
    return None if values is None else values[:, first : first + count]
