"""Keeping tier runs beside the trace: `whatifs/<id>/`, tables `tier_*`."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvtrace.store import StoreWriter, publish
from kvtrace.trace import Trace
from kvtrace_viewer.blocks.stream import BlockStream
from kvtrace_viewer.tiers.hardware import Hardware
from kvtrace_viewer.tiers.recorded import RecordedTimes
from kvtrace_viewer.tiers.residency import Longs
from kvtrace_viewer.tiers.result import TierResult
from kvtrace_viewer.tiers.token_result import COLD, TokenResult

Columns = Mapping[str, Any]


def run_id(what: str, hardware: Hardware, rules: object) -> str:
    """Name of a run's folder: what ran, where, and a digest of every figure and rule."""
    digest = hashlib.sha256(json.dumps([repr(hardware), repr(rules)]).encode()).hexdigest()[:8]
    machine = re.split(r"[^a-z0-9]+", hardware.name.lower())[0]
    return re.sub(r"[^A-Za-z0-9_.=-]", ".", f"{what}-{machine}-{digest}")


def store(trace: Trace, name: str, tables: Mapping[str, Columns]) -> None:
    """Write a run's tables, in the place of an older run of the same name; whole or not at all."""
    directory = trace.whatif_directory()
    aside = directory / f".{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    writer = StoreWriter(aside)
    for table, columns in tables.items():
        length = len(next(iter(columns.values())))
        if length:
            writer.append(table, {"tier_run": np.full(length, name), **columns})
    writer.close()
    publish(aside, directory / name)


def store_tokens(trace: Trace, result: TokenResult) -> str:
    """Keep a token placement; returns its name."""
    name = run_id(result.replay, result.hardware, (result.options, result.needed_share))
    model = trace.table("models")["name"][0].as_py()
    store(trace, name, token_tables(result, model))
    return name


def store_blocks(trace: Trace, result: TierResult, model: str, recorded: RecordedTimes) -> str:
    """Keep a block run; returns its name."""
    name = run_id(result.options.policy, result.hardware, (result.options, model))
    store(trace, name, block_tables(result, model, recorded))
    return name


def block_tables(result: TierResult, model: str, recorded: RecordedTimes) -> dict[str, Columns]:
    """Columns of the tables of a block run; a step is the prompt of a request that was served."""
    ledger, size = result.ledger, result.block_bytes
    served = np.flatnonzero(result.served)
    found = result.to_json()
    ttft = result.ttft_ns
    run = {
        "kind": ["blocks"],
        "replay": [None],
        "created_ns": [time.time_ns()],
        "hardware": [result.hardware.name],
        "model": [model],
        "options": [json.dumps(result.options.to_json())],
        "unit_bytes": [size],
        "requests": [len(result.arrival_ns)],
        "refused": [found["refused"]],
        "compute_ns": [int(ledger.work_ns.sum())],
        "stall_ns": [int(result.stall_ns.sum())],
        "span_ns": [result.span_ns],
        "ttft_mean_ns": [float(ttft.mean()) if len(ttft) else None],
        "recorded_ttft_mean_ns": [recorded.ttft_s and recorded.ttft_s * 1e9],
        "tokens_per_second": [result.batches and result.batches.tokens_per_s],
        "recorded_tokens_per_second": [recorded.tokens_per_s],
    }
    moved = (("up", ledger.up[served]), ("down", ledger.down[served]))
    tiers = len(result.hardware.tiers)
    levels = _levels(result.hardware, found["tiers"], [one["hits"] for one in found["tiers"]])
    return {
        "tier_runs": run,
        "tier_levels": {**levels, "capacity_bytes": [n * size for n in result.capacities]},
        "tier_steps": _block_steps(result, served),
        "tier_transfers": transfers(
            [
                (
                    np.arange(len(served)),
                    np.full(len(served), tier),
                    way,
                    n[:, tier],
                    n[:, tier] * size,
                )
                for way, n in moved
                for tier in range(1, tiers)
            ]
        ),
        "tier_occupancy": {
            "step": np.repeat(np.arange(len(served)), tiers),
            "ts_ns": np.repeat(_first_tokens(result)[served], tiers),
            "tier": np.tile(np.arange(tiers), len(served)),
            "bytes": (ledger.occupancy[served] * size).ravel(),
        },
        "tier_blocks": _blocks(result.blocks),
        "tier_moves": _moves(result, served),
    }


def _block_steps(result: TierResult, served: Longs) -> Columns:
    """Table `tier_steps`: prompts, then the decode steps between them."""
    ledger, count = result.ledger, len(served)
    ones = np.ones(count, np.int64)
    prompts = {
        "step": np.arange(count),
        "phase": np.full(count, "prefill"),
        "request": result.request_ids[served],
        "batch_size": ones,
        "steps": ones,
        "tokens": result.prompt_tokens[served],
        "started_ns": ledger.start_ns[served],
        "compute_ns": ledger.work_ns[served],
        "stall_ns": result.stall_ns,
    }
    if result.batches is None:
        return prompts
    found = result.batches.stretches
    number = len(found.steps)
    decoded = {
        "step": count + np.arange(number),
        "phase": np.full(number, "decode"),
        "request": np.full(number, None),
        "batch_size": found.batch,
        "steps": found.steps,
        "tokens": found.batch * found.steps,
        "started_ns": found.start_ns,
        "compute_ns": found.time_ns,
        "stall_ns": np.zeros(number, np.int64),
    }
    # Decoding comes between them, so that they begin later than alone.
    took = ledger.end_ns - ledger.start_ns
    prompts["started_ns"] = (_first_tokens(result) - took)[served]
    return {name: [*values, *decoded[name]] for name, values in prompts.items()}


def _first_tokens(result: TierResult) -> Longs:
    """When each prompt was done: with decoding where that was asked for and the request fitted."""
    alone = result.ledger.end_ns
    if result.batches is None:
        return alone
    return np.where(result.batches.first_ns < 0, alone, result.batches.first_ns)


def _blocks(stream: BlockStream) -> Columns:
    """Table `tier_blocks`; dense ids are in the order of first accesses."""
    _, first = np.unique(stream.blocks, return_index=True)
    return {
        "block": np.arange(stream.num_blocks),
        "block_index": stream.index[first],
        "tokens": stream.tokens[first],
        "accesses": np.bincount(stream.blocks, minlength=stream.num_blocks),
    }


def _moves(result: TierResult, served: Longs) -> Columns:
    request, block, tier = result.moved.T
    return {
        "step": np.searchsorted(served, request),
        "block": block,
        "tier": np.where(tier < 0, -1 - tier, tier),
        "arrives": tier >= 0,
    }


def token_tables(result: TokenResult, model: str) -> dict[str, Columns]:
    """Columns of the tables of a token placement; steps are those of the recording."""
    at, steps = result.decodes, result.steps
    number = np.arange(len(steps.number))
    found = result.to_json()
    took = steps.duration_ns + result.stall_ns
    run = {
        "kind": ["tokens"],
        "replay": [result.replay],
        "created_ns": [time.time_ns()],
        "hardware": [result.hardware.name],
        "model": [model],
        "options": [json.dumps(result.options.to_json())],
        "unit_bytes": [None],
        "requests": [len(result.tokens)],
        "refused": [0],
        "compute_ns": [int(result.compute_ns.sum())],
        "stall_ns": [int(result.stall_ns.sum())],
        "span_ns": [int(took[at].sum())],
        "ttft_mean_ns": [None],
        "recorded_ttft_mean_ns": [None],
        "tokens_per_second": [found["tokens_per_s"]],
        "recorded_tokens_per_second": [found["recorded_tokens_per_s"]],
        **{key: [found[key]] for key in ("retained_mass", "late_mass", "lost_mass")},
    }
    by_step = {
        "step": at,
        "recorded_step": steps.number[at],
        "phase": np.full(len(at), "decode"),
        "request": [None] * len(at),
        "batch_size": result.rows[at],
        "steps": np.ones(len(at), np.int64),
        "tokens": result.rows[at],
        "started_ns": steps.started_ns[at],
        "compute_ns": steps.duration_ns[at],
        "stall_ns": result.stall_ns[at],
        "retained_mass": result.retained[at],
        "late_mass": result.late[at],
        "lost_mass": result.lost[at],
    }
    moved = (
        ("up", result.fetched, result.bytes_up),
        ("down", result.moved_down, result.bytes_down),
    )
    tiers = np.arange(result.held.shape[1])
    return {
        "tier_runs": run,
        "tier_levels": _levels(result.hardware, found["tiers"], [result.hits, result.misses]),
        "tier_steps": by_step,
        "tier_transfers": transfers(
            [(number, np.full(len(number), COLD), way, units, size) for way, units, size in moved]
        ),
        "tier_occupancy": {
            "step": np.repeat(number, len(tiers)),
            "ts_ns": np.repeat(steps.started_ns + took, len(tiers)),
            "tier": np.tile(tiers, len(number)),
            "bytes": result.held.ravel(),
        },
        "tier_tokens": _tokens(result),
    }


def _tokens(result: TokenResult) -> Columns:
    parts = [
        {
            "request": np.full(len(one.slots), request),
            "position": np.arange(len(one.slots)),
            "slots": one.slots,
            "cold_slots": one.cold_slots,
            "first_cold": one.first_cold.astype(object),
            "fetches": one.fetches,
            "late_mass": one.late_mass,
        }
        for request, one in result.tokens.items()
    ]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found["first_cold"][found["first_cold"] == -1] = None
    return {**found, "first_cold": found["first_cold"].tolist()}


def _levels(hardware: Hardware, came_to: list[dict[str, Any]], hits: list[int]) -> Columns:
    """Table `tier_levels` from the tiers of a result's JSON."""
    tiers = hardware.tiers[: len(came_to)]
    return {
        "tier": list(range(len(tiers))),
        "name": [tier.name for tier in tiers],
        "capacity_bytes": [tier.capacity for tier in tiers],
        "read_bandwidth": [tier.read for tier in tiers],
        "write_bandwidth": [tier.write for tier in tiers],
        "latency_ns": [round(tier.latency * 1e9) for tier in tiers],
        "source": [tier.source for tier in tiers],
        "hits": hits,
        **{
            name: [one[name] for one in came_to]
            for name in ("bytes_up", "bytes_down", "peak_bytes", "mean_bytes", "cost_per_hour")
        },
    }


def transfers(parts: list[tuple[Any, Any, str, Any, Any]]) -> Columns:
    """Table `tier_transfers` from (step, tier, direction, units, bytes), without empty ones."""
    kept = [(step, tier, way, units, size, units > 0) for step, tier, way, units, size in parts]
    return {
        "step": np.concatenate([step[some] for step, *_, some in kept]),
        "tier": np.concatenate([tier[some] for _, tier, *_, some in kept]),
        "direction": np.concatenate([np.full(some.sum(), way) for _, _, way, *_, some in kept]),
        "units": np.concatenate([units[some] for *_, units, _, some in kept]),
        "bytes": np.concatenate([size[some] for *_, size, some in kept]),
    }
