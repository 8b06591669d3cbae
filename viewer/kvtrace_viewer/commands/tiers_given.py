"""What the command line of `kvtrace tiers` says of the machine, the model and the rules."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvtrace.errors import InputError
from kvtrace.sizes import parse_bytes
from kvtrace.trace import Trace

if TYPE_CHECKING:
    from kvtrace_viewer.tiers import Hardware, Options, ServedModel

#: Values of --compute.
COMPUTE = {
    "recorded": "of a recorded model, a token takes what it took in the recorded steps",
    "machine": "what the machine's FLOPS say",
}


def given_hardware(args: argparse.Namespace) -> Hardware:
    """The machine with what the command line says of it."""
    from kvtrace_viewer.tiers import read_hardware

    hardware = read_hardware(args.tiers)
    for option in ("capacity", "bandwidth"):
        for text in getattr(args, option):
            tier, equals, size = text.partition("=")
            if not equals:
                raise InputError(
                    f"--{option} {text!r} has no =; TIER=SIZE was expected; write DRAM=256GB"
                )
            if option == "capacity":
                figure = 0 if size == "0" else parse_bytes(size, f"--capacity {tier}", "256GB")
                hardware = hardware.with_figure(tier, capacity=figure)
            else:
                figure = parse_bytes(size, f"--bandwidth {tier}", "3GB")
                hardware = hardware.with_figure(tier, read=figure, write=figure)
    return hardware


def given_options(args: argparse.Namespace) -> Options:
    """The rules."""
    from kvtrace_viewer.tiers import Options

    return Options(
        policy=args.policy,
        mode=args.mode,
        load=args.load,
        overlap=not args.no_overlap,
        prefetch=args.prefetch,
        max_batch=args.max_batch,
    )


def given_model(trace: Trace, args: argparse.Namespace) -> ServedModel:
    """The model that the command line names, else the recorded one, else Llama-3-8B.

    What the command line says of it counts whichever it is.
    """
    model = _model_of(trace, args)
    changed: dict[str, Any] = {}
    if args.kv_bytes_per_token is not None:
        changed["kv_bytes_per_token"] = parse_bytes(
            args.kv_bytes_per_token, "--kv-bytes-per-token", "128KiB"
        )
    for name in ("parameters", "layers"):
        if (value := getattr(args, name)) is not None:
            if not value >= 1 or value == float("inf"):
                raise InputError(f"--{name} is {value}; at least 1 was expected; write --{name} 32")
            changed[name] = int(value)
    if args.prefill_tokens_per_s is not None:
        if not args.prefill_tokens_per_s > 0:
            raise InputError(
                f"--prefill-tokens-per-s is {args.prefill_tokens_per_s}; a number above 0 was"
                " expected; write --prefill-tokens-per-s 20000"
            )
        changed["ns_per_token"] = 1e9 / args.prefill_tokens_per_s
    if not changed:
        return model
    return replace(model, name=f"{model.name}, changed", **changed)


def _model_of(trace: Trace, args: argparse.Namespace) -> ServedModel:
    from kvtrace_viewer.memory import read_model
    from kvtrace_viewer.tiers import LLAMA_3_8B
    from kvtrace_viewer.tiers.recorded import recorded_model, served

    if args.model is not None:
        return served(read_model(args.model), args.model)
    return recorded_model(trace, own_pace=args.compute == "recorded") or LLAMA_3_8B
