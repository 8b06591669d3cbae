"""Requests as OpenTelemetry spans, in OTLP's JSON: what `otelcol` and its backends read.

A span is a request. Attributes take the names of the GenAI semantic conventions where these have
one; what they do not know stands under `kvtrace.`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvtrace.export.target import new_target
from kvtrace.export.timeline import RankTimeline, RequestTimes, timelines
from kvtrace.trace import Trace
from kvtrace.version import __version__

#: SPAN_KIND_INTERNAL: the model runs in the recorded process.
_INTERNAL = 1
#: The release of the conventions whose names these are, the first that knows what a cache gave;
#: GenAI's moved to a repository of their own later.
SCHEMA_URL = "https://opentelemetry.io/schemas/1.40.0"


def export_otel(
    trace: Trace,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> int:
    """Write one OTLP/JSON document (TracesData); returns how many spans it holds.

    Raises
    ------
    InputError
        Where the file exists and `force` is not given.
    """
    ranks = timelines(trace)
    origin = f"{trace.manifest.created_ns} {trace.manifest.command}"
    with new_target(out, force=force) as place, place.open("w", encoding="utf-8") as file:
        file.write('{"resourceSpans":[')
        for done, rank in enumerate(ranks, start=1):
            head = {"resource": {"attributes": _attributes(_resource(rank))}}
            scope = {"name": "kvtrace", "version": __version__}
            file.write(("," if done > 1 else "") + json.dumps(head)[:-1])
            file.write(f',"scopeSpans":[{{"scope":{json.dumps(scope)},')
            file.write(f'"schemaUrl":"{SCHEMA_URL}","spans":[')
            for number, span in enumerate(_spans(rank, origin)):
                file.write(("," if number else "") + "\n" + json.dumps(span))
            file.write("]}]}")
            progress(done / len(ranks))
        file.write("]}\n")
    return sum(len(rank.requests) for rank in ranks)


def _resource(rank: RankTimeline) -> dict[str, Any]:
    return {
        "service.name": "kvtrace",
        "service.instance.id": str(rank.rank),
        "host.name": rank.run.get("host"),
        "process.pid": rank.run.get("pid"),
        "process.runtime.version": rank.run.get("python"),
    }


def _spans(rank: RankTimeline, origin: str) -> Iterator[dict[str, Any]]:
    for request in rank.requests:
        identity = hashlib.sha256(f"{origin} {request.request}".encode()).hexdigest()
        attributes = _request(rank, request)
        model = attributes["gen_ai.request.model"]
        yield {
            "traceId": identity[:32],
            "spanId": identity[32:48],
            "name": f"{attributes['gen_ai.operation.name']} {model}",
            "kind": _INTERNAL,
            "startTimeUnixNano": _time(rank, request.start_ns),
            "endTimeUnixNano": _time(rank, request.end_ns),
            "attributes": _attributes(attributes),
        }


def _time(rank: RankTimeline, ts_ns: int) -> str:
    return str(int(rank.clock.align(ts_ns)))


def _request(rank: RankTimeline, request: RequestTimes) -> dict[str, Any]:
    model = rank.models.get(request.model)
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "transformers" if rank.run.get("transformers") else "unknown",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": request.external_id,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": request.shared_tokens,
        "kvtrace.request": request.request,
        "kvtrace.rank": rank.rank,
        "kvtrace.prefill_ns": (request.decode_ns or request.end_ns) - request.start_ns,
    }


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """As OTLP's JSON has them; what is not known is left out."""
    return [
        {"key": key, "value": {"stringValue": value} if isinstance(value, str) else _number(value)}
        for key, value in values.items()
        if value is not None
    ]


def _number(value: int) -> dict[str, Any]:
    # 64-bit integers are strings in the JSON of protocol buffers.
    return {"intValue": str(value)}
