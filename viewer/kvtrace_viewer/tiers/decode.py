"""Continuous batching behind the prompts: decode steps, tokens per second, and the GPU's L2.

Prompts come first, one at a time and in their order, as the tier replay served them; between them
every running request decodes a token a step. Whole nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.tiers.hardware import Hardware
from kvtrace_viewer.tiers.residency import Longs
from kvtrace_viewer.tiers.spread import spread


class DecodePace(NamedTuple):
    """How long a decode step takes: what it streams or what it computes, whichever is longer.

    Attributes
    ----------
    weights_ns : float
        Streaming the weights out of the first tier.
    token_ns : float
        Streaming one token's keys and values.
    compute_ns : float
        Computing one token.
    step_ns : float
        What a step took when recorded, whatever its batch; 0 where the above say it.
    """

    weights_ns: float
    token_ns: float
    compute_ns: float
    step_ns: float = 0.0


class Stretches(NamedTuple):
    """Decode steps of one batch in a row, all int64 [stretch].

    Attributes
    ----------
    start_ns, time_ns : when the first began, and how long all took
    steps, batch : how many there were, and requests in each
    context : tokens held by the batch at the first step
    """

    start_ns: Longs
    time_ns: Longs
    steps: Longs
    batch: Longs
    context: Longs


@dataclass(frozen=True, eq=False)
class Batches:
    """A workload, prompts and decoding.

    Attributes
    ----------
    max_batch : int
        Requests that run at once.
    first_ns, finish_ns : int64 [request]
        When its first and its last token were there; -1 where it never ran.
    arrival_ns, output_tokens : int64 [request]
    stretches : Stretches
        The decode steps.
    l2 : dict or None
        `l2_reuse`; None where the hardware file does not give an L2.
    """

    max_batch: int
    first_ns: Longs
    finish_ns: Longs
    arrival_ns: Longs
    output_tokens: Longs
    stretches: Stretches
    l2: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        ran = self.first_ns >= 0
        several = ran & (self.output_tokens > 1)
        steps, batch = self.stretches.steps, self.stretches.batch
        span = int(self.finish_ns.max(initial=0) - self.arrival_ns.min(initial=0))
        between = (self.finish_ns - self.first_ns)[several] / (self.output_tokens[several] - 1)
        return {
            "max_batch": self.max_batch,
            "refused": int((~ran).sum()),
            "ttft_s": spread((self.first_ns - self.arrival_ns)[ran]),
            "time_per_output_token_s": spread(between),
            "decode_steps": int(steps.sum()),
            "mean_batch": float((steps * batch).sum() / steps.sum()) if steps.sum() else None,
            "decode_s": float(self.stretches.time_ns.sum()) / 1e9,
            "span_s": span / 1e9,
            "output_tokens_per_s": self.tokens_per_s,
            "l2": self.l2,
        }

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens of all requests by the span, from the first arrival on."""
        ran = self.first_ns >= 0
        if not ran.any():
            return None
        span = int(self.finish_ns[ran].max() - self.arrival_ns[ran].min())
        return float(np.maximum(self.output_tokens[ran], 1).sum()) / span * 1e9 if span else None


def serve_batches(
    arrival_ns: Longs,
    service_ns: Longs,
    prompt_tokens: Longs,
    output_tokens: Longs,
    needs: Longs,
    capacity: int,
    max_batch: int,
    pace: DecodePace,
) -> Batches:
    """Serve requests in their order; a prompt goes before decode steps where it has room.

    Parameters
    ----------
    arrival_ns, service_ns : int64 [request]
        When each comes, and how long its prompt takes; -1 where it does not fit at all.
    prompt_tokens, output_tokens : int64 [request]
        The first output token comes with the prompt.
    needs : int64 [request]
        Blocks that its prompt and its output take; it runs when they are free together.
    capacity : int
        Blocks of the first tier.
    max_batch : int
        Requests that run at once.
    pace : DecodePace
        How long steps take.
    """
    first, finish = (np.full(len(arrival_ns), -1, np.int64) for _ in range(2))
    table = np.zeros((2 * len(arrival_ns) + 1, 5), np.int64)
    used = _serve(
        arrival_ns,
        service_ns,
        prompt_tokens,
        output_tokens,
        needs,
        capacity,
        max_batch,
        pace,
        first,
        finish,
        table,
    )
    stretches = Stretches(*(np.ascontiguousarray(column) for column in table[:used].T))
    return Batches(max_batch, first, finish, arrival_ns, output_tokens, stretches)


@jit
def _serve(
    arrival_ns: Longs,
    service_ns: Longs,
    prompt_tokens: Longs,
    output_tokens: Longs,
    needs: Longs,
    capacity: int,
    max_batch: int,
    pace: DecodePace,
    first: Longs,
    finish: Longs,
    table: Longs,
) -> int:
    running = np.empty(max_batch, np.int64)
    left = np.empty(max_batch, np.int64)
    count = 0
    held = 0
    context = 0
    now = 0
    used = 0
    requests = len(arrival_ns)
    r = 0
    while r < requests or count > 0:
        if r < requests and (service_ns[r] < 0 or needs[r] > capacity):
            r += 1
            continue
        has_room = r < requests and count < max_batch and held + needs[r] <= capacity
        if has_room and (count == 0 or arrival_ns[r] <= now):
            now = max(now, arrival_ns[r]) + service_ns[r]
            first[r] = now
            if output_tokens[r] > 1:
                running[count] = r
                left[count] = output_tokens[r] - 1
                count += 1
                held += needs[r]
                context += prompt_tokens[r] + 1
            else:
                finish[r] = now
            r += 1
            continue
        # Until somebody is done, or the next one may come in.
        table[used, 0] = now
        table[used, 3] = count
        table[used, 4] = context
        least = left[:count].min()
        steps = 0
        while steps < least and not (steps > 0 and has_room and arrival_ns[r] <= now):
            now += _step_ns(pace, count, context)
            context += count
            steps += 1
        table[used, 1] = now - table[used, 0]
        table[used, 2] = steps
        used += 1
        kept = 0
        for i in range(count):
            left[i] -= steps
            if left[i] == 0:
                done = running[i]
                finish[done] = now
                held -= needs[done]
                context -= prompt_tokens[done] + output_tokens[done]
            else:
                running[kept] = running[i]
                left[kept] = left[i]
                kept += 1
        count = kept
    return used


@jit
def _step_ns(pace: DecodePace, batch: int, context: int) -> int:
    """Nanoseconds of one decode step of a batch that holds so many tokens."""
    if pace.step_ns > 0:
        return int(np.ceil(pace.step_ns))
    streamed = pace.weights_ns + context * pace.token_ns
    return int(np.ceil(max(streamed, batch * pace.compute_ns)))


def l2_reuse(
    stretches: Stretches, hardware: Hardware, kv_bytes: int, weights: int, layers: int
) -> dict[str, Any] | None:
    """What of a decode step's reads the GPU's L2 can serve: arithmetic, nothing is simulated.

    A key read in one step is read again in the next, once all weights and the batch's cache have
    passed: where they fit into the L2 it serves all of it, else no more than its share. Within a
    step only blocks that several requests share are read twice, once a layer's cache has passed.
    None without an L2 in the hardware file, or without decode steps.
    """
    if hardware.l2 is None or not stretches.steps.sum():
        return None
    mean_context = stretches.context + stretches.batch * (stretches.steps - 1) / 2
    cache = mean_context * kv_bytes
    step = cache + weights
    size = hardware.l2.capacity

    def mean(values: Any) -> float:
        return float(np.average(values, weights=stretches.steps))

    return {
        "capacity": size,
        "source": hardware.l2.source,
        "cache_bytes_per_step": mean(cache),
        "bytes_per_step": mean(step),
        "most_from_l2": mean(np.minimum(1.0, size / step)),
        "steps_whose_layer_fits": mean(cache / layers <= size),
    }
