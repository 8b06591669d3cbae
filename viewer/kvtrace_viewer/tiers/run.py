"""`replay_tiers`: a block stream over a machine's memory tiers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.stream import BlockStream
from kvtrace_viewer.tiers import schedule
from kvtrace_viewer.tiers.decode import Batches, DecodePace, l2_reuse, serve_batches
from kvtrace_viewer.tiers.hardware import Hardware, Tier
from kvtrace_viewer.tiers.options import Options
from kvtrace_viewer.tiers.order import order_number
from kvtrace_viewer.tiers.residency import Longs, Residency, empty
from kvtrace_viewer.tiers.result import TierResult


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What of a model a tier replay needs.

    Attributes
    ----------
    name : str
        For people.
    kv_bytes_per_token : int
        Keys and values of all layers.
    parameters : int
        Two floating point operations a token each.
    layers : int
        Attention layers.
    ns_per_token : float or None
        Computing of one prompt token where it was measured; None: from the machine's FLOPS.
    weight_bytes : float
        Bytes of the first tier that each parameter takes.
    step_ns : float or None
        A decode step where it was measured; None: from the first tier's bandwidth and the FLOPS.
    notes : tuple of str
        What must be known to read results, for people.
    """

    name: str
    kv_bytes_per_token: int
    parameters: int
    layers: int
    ns_per_token: float | None = None
    weight_bytes: float = 2.0
    step_ns: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Bytes of the parameters."""
        return int(self.parameters * self.weight_bytes)


#: What a workload without a model is replayed for: 8 KV heads of 128, 32 layers, 16 bit.
LLAMA_3_8B = ServedModel(
    name="Llama-3-8B", kv_bytes_per_token=131_072, parameters=8_030_261_248, layers=32
)

#: Share of the first tier that serves weights and cache, as vLLM's gpu_memory_utilization.
USABLE = 0.9


def replay_tiers(
    stream: BlockStream,
    hardware: Hardware,
    model: ServedModel = LLAMA_3_8B,
    options: Options | None = None,
) -> TierResult:
    """Serve a workload's requests, one prompt after another, from a machine's memory tiers.

    Parameters
    ----------
    stream : BlockStream
        Full blocks are shared; a partial last one is computed and kept nowhere.
    hardware : Hardware
        The tiers. The first holds the model's weights too.
    model : ServedModel
        Whose cache it is.
    options : Options, optional
        The rules.

    Raises
    ------
    InputError
        Where the first tier has no room for a block beside the weights, or nothing says how
        fast the machine computes.
    """
    options = options or Options()
    stream = stream.full_blocks()
    size = model.kv_bytes_per_token * stream.block_size
    capacities = _capacities(hardware, model, size)
    machine = schedule.Machine(
        read_ns=_times(hardware, size, "read"),
        write_ns=_times(hardware, size, "write"),
        latency_ns=np.array([round(t.latency * 1e9) for t in hardware.tiers], np.int64),
        compute_ns=_compute_ns(hardware, model),
        layers=model.layers if options.overlap else 0,
        order=order_number(options.policy),
        write_through=options.mode == "write-through",
        prefetch=options.prefetch,
        always_load=options.load == "always",
    )
    work = schedule.Workload(
        blocks=stream.blocks,
        starts=stream.starts,
        tokens=stream.tokens,
        is_output=stream.is_output,
        next_access=stream.next_access,
        arrival_ns=stream.arrival_ns,
        prompt_tokens=stream.prompt_tokens,
    )
    ledger = schedule.new_ledger(stream.requests, len(hardware.tiers))
    at = empty(stream.num_blocks, list(capacities), stream.accesses)
    schedule.run(work, machine, at, ledger)
    return TierResult(
        hardware=hardware,
        options=options,
        block_bytes=size,
        capacities=capacities,
        ledger=ledger,
        arrival_ns=stream.arrival_ns,
        prompt_tokens=stream.prompt_tokens,
        request_ids=stream.request_ids if len(stream.request_ids) else np.arange(stream.requests),
        moved=at.moved[: at.moves[0]],
        blocks=stream,
        batches=_batches(stream, hardware, model, options, ledger, capacities[0]),
        notes=(*stream.notes, *model.notes, *_left_out(at)),
    )


def _batches(
    stream: BlockStream,
    hardware: Hardware,
    model: ServedModel,
    options: Options,
    ledger: schedule.Ledger,
    capacity: int,
) -> Batches | None:
    """Prompts as they were served one by one, with decoding between them."""
    if not options.max_batch:
        return None
    read = hardware.tiers[0].read
    pace = DecodePace(
        weights_ns=model.weights / read * 1e9,
        token_ns=model.kv_bytes_per_token / read * 1e9,
        compute_ns=_compute_ns(hardware, model),
        step_ns=model.step_ns or 0.0,
    )
    output = stream.output_tokens if len(stream.output_tokens) else np.zeros_like(ledger.start_ns)
    found = serve_batches(
        stream.arrival_ns,
        np.where(ledger.end_ns < 0, -1, ledger.end_ns - ledger.start_ns),
        stream.prompt_tokens,
        output,
        -(-(stream.prompt_tokens + output) // stream.block_size),
        capacity,
        options.max_batch,
        pace,
    )
    l2 = l2_reuse(found.stretches, hardware, model.kv_bytes_per_token, model.weights, model.layers)
    return replace(found, l2=l2)


def _left_out(at: Residency) -> list[str]:
    if at.moves[0] <= len(at.moved):
        return []
    until = at.moved[-1, 0]
    return [f"blocks moved {at.moves[0]:,} times: where they lay is known until request {until:,}"]


def _capacities(hardware: Hardware, model: ServedModel, size: int) -> tuple[int, ...]:
    first = int(hardware.tiers[0].capacity * USABLE) - model.weights
    if first < size:
        raise InputError(
            f"{hardware.tiers[0].name} of {hardware.name} has {hardware.tiers[0].capacity:,} bytes,"
            f" of which {USABLE:.0%} do not hold the {model.weights:,} bytes of"
            f" {model.name}'s weights and a block of {size:,}; a larger first tier or a smaller"
            " model was expected; give another --tiers, --capacity or --parameters"
        )
    return (first // size, *(tier.capacity // size for tier in hardware.tiers[1:]))


def _times(hardware: Hardware, size: int, direction: str) -> Longs:
    """Nanoseconds of one block by tier; of the first tier none, since nothing is above it."""

    def time(tier: Tier) -> int:
        return int(np.ceil(size / getattr(tier, direction) * 1e9))

    return np.array([0, *map(time, hardware.tiers[1:])], np.int64)


def _compute_ns(hardware: Hardware, model: ServedModel) -> float:
    if model.ns_per_token is not None:
        return model.ns_per_token
    if not hardware.flops:
        raise InputError(
            f"{hardware.name} does not say how fast it computes; compute.bf16_flops in its file"
            " was expected; write it there, or give --prefill-tokens-per-s"
        )
    return 2 * model.parameters / hardware.flops * 1e9
