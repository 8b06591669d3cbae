r"""Replay a trace through eviction policies at several budgets, in one pass.

Every policy is asked at every budget. Each result (retained mass, hits, misses, what was evicted
when) is kept under the trace's replays/ and shown by `kvtrace view`.

Example: kvtrace replay traces/demo.kvtrace --policy h2o --policy streaming_llm:sinks=4 \
             --policy oracle --budget 25% --budget 128 --when step
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvtrace
from kvtrace.console import progress
from kvtrace.errors import InputError
from kvtrace_viewer.commands.policies import list_policies
from kvtrace_viewer.commands.replay_table import show_results
from kvtrace_viewer.commands.wanted import show_wanted

if TYPE_CHECKING:
    from kvtrace_viewer.replay import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", nargs="?", help="a .kvtrace directory")
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help="a policy and its parameters, or one of your own as FILE.py:Class[:KEY=VALUE,...]; "
        "may be given several times (list below)",
    )
    parser.add_argument(
        "--budget",
        action="append",
        metavar="N|P%|A..B/STEP",
        help="tokens kept per KV head, a percentage of those present, or a range of either, such "
        "as 5%%..100%%/5%%; may be given several times",
    )
    parser.add_argument(
        "--when",
        metavar="RHYTHM",
        help="when to cut: prefill (once, after the prompt), step (there and after every decoded "
        "token), every=N (after every N decoded tokens), stream (after every token), chunk=N (in "
        "the prompt after every N tokens and its last), chunk (the same, by the chunks in which it "
        "was prefilled when recorded); default: what the policy's paper does",
    )
    parser.add_argument(
        "--request",
        action="append",
        type=int,
        metavar="N",
        help="only this request; may be given several times (default: all)",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="instead list all policies, and with T how well it replays each (also with --json)",
    )
    parser.add_argument(
        "--rerotate",
        action="store_true",
        help="renumber kept tokens by their place in the cache and re-rotate their keys (RoPE), as "
        "StreamingLLM does: output error and overlap are then of that attention",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument(
        "--kept",
        type=Path,
        metavar="FILE",
        help="write the positions kept after the last decision, by layer and KV head, as JSON",
    )
    parser.add_argument(
        "--reads",
        type=Path,
        metavar="FILE.npz",
        help="write what every query reads, of one policy that chooses it (quest, rocketkv, top_k,"
        " recent_n) at one budget: rows, and layerL [row, KV head, byte], a bit a key",
    )
    parser.add_argument(
        "--regret",
        action="store_true",
        help="also find who later wanted what was evicted: tables replay_regrets and replay_wants,"
        " view evicted_but_needed",
    )
    parser.add_argument(
        "--no-store", action="store_true", help="do not keep the results beside the trace"
    )
    parser.epilog = "policies (kvtrace replay --list also says what they need):\n" + _policies()
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    """Replay, keep, print."""
    from kvtrace_viewer.replay import Measures, replay

    if args.list:
        list_policies(kvtrace.open(args.trace) if args.trace else None, args.json)
        return 0
    lacking = [
        name
        for name, value in (("T", args.trace), ("--policy", args.policy), ("--budget", args.budget))
        if not value
    ]
    if lacking:
        return _misused(args, f"the following arguments are required: {', '.join(lacking)}")
    trace = kvtrace.open(args.trace)
    if args.kept and len(args.request or trace.requests()) > 1:
        raise InputError(
            f"--kept writes one request's sets; {len(args.request or trace.requests())} requests "
            "would be replayed; add --request N"
        )
    if args.reads:
        _check_reads(trace, args)
    if args.regret and args.no_store:
        raise InputError(
            "--regret and --no-store were given; regrets are kept with their replay; give one"
        )
    with progress("replaying") as tell:
        results = replay(
            trace,
            args.policy,
            args.budget,
            args.when,
            args.request,
            store=not args.no_store,
            progress=tell,
            measures=Measures(keep_reads=args.reads is not None),
            rerotate=args.rerotate,
        )
    wanted = _regrets(trace, results) if args.regret else {}
    if args.kept:
        _write_kept(results, args.kept)
    if args.reads:
        from kvtrace_viewer.replay.reads import write_reads

        (result,) = results
        write_reads(next(iter(result.reads.values()), {}), args.reads)
    if args.json:
        found = [result.to_json() | wanted.get(result.id, {}) for result in results]
        print(json.dumps(found, indent=1))
    else:
        show_results(results, args)
        show_wanted(wanted)
    return 0


def _misused(args: argparse.Namespace, reason: str) -> int:
    """What argparse does for arguments that are always required."""
    args.parser.print_usage(sys.stderr)
    print(f"{args.parser.prog}: error: {reason}", file=sys.stderr)
    return 2


def _check_reads(trace: kvtrace.Trace, args: argparse.Namespace) -> None:
    """Refuse to write reads of what has none, or of several results into one file."""
    from kvtrace_viewer.replay.amounts import parse_budgets
    from kvtrace_viewer.replay.spec import parse_policy

    policies = [parse_policy(text) for text in args.policy]
    requests = args.request or trace.requests()
    budgets = [one for text in args.budget for one in parse_budgets(text)]
    counts = f"{len(policies)} policies, {len(budgets)} budgets and {len(requests)} requests"
    if (len(policies), len(budgets), len(requests)) != (1, 1, 1):
        raise InputError(
            f"--reads writes what one policy reads at one budget in one request; {counts} were"
            " given; give one of each (--request N)"
        )
    if not policies[0].selects:
        raise InputError(
            f"{args.policy[0]} does not choose what each query reads: all read what is held;"
            " --reads is for quest, rocketkv, top_k and recent_n; use --kept for what is held"
        )


def _regrets(trace: kvtrace.Trace, results: list[Result]) -> dict[str, dict[str, Any]]:
    """Find and keep who wanted what was evicted: `regret` and `wanted`, by result."""
    from kvtrace_viewer.derived.wanted import wanted_tokens
    from kvtrace_viewer.replay.regret import compute_regrets, store_regrets

    with progress("finding regrets") as tell:
        evicted_at = {result.id: result.evicted_at for result in results}
        found = compute_regrets(trace, evicted_at, progress=tell)
    for name, regrets in found.items():
        store_regrets(trace, name, regrets)
    return {
        name: {"regret": regrets.total, "wanted": wanted_tokens(trace, name)}
        for name, regrets in found.items()
    }


def _policies() -> str:
    from kvtrace_viewer.replay.plugins import known_names, named_policy
    from kvtrace_viewer.replay.spec import describe, idea

    lines = []
    for name in known_names():
        try:
            kind = named_policy(name)
        except InputError as error:
            lines.append(f"  {name:<20} {error}")
            continue
        if kind is not None:
            lines += [f"  {name:<20} {idea(kind)}", f"  {'':<20} takes {describe(kind)}"]
    return "\n".join(lines)


def _write_kept(results: list[Result], path: Path) -> None:
    found = {
        f"{result.policy}@{result.budget}": {
            str(layer): {str(head): positions.tolist() for head, positions in heads.items()}
            for layer, heads in result.kept().items()
        }
        for result in results
    }
    try:
        path.write_text(json.dumps(found), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); --kept takes a file to write; "
            "choose another place"
        ) from error
