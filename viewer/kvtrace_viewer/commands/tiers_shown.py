"""What `kvtrace tiers` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvtrace.console import console, human_bytes

if TYPE_CHECKING:
    from kvtrace_viewer.tiers import ServedModel, TierResult
    from kvtrace_viewer.tiers.recorded import RecordedTimes
    from kvtrace_viewer.tiers.token_result import TokenResult


def show_blocks(name: str, model: ServedModel, result: TierResult, recorded: RecordedTimes) -> None:
    """Print a block run."""
    out = console()
    found = result.to_json()
    out.print(
        f"{found['requests']:,} request{'' if found['requests'] == 1 else 's'} on"
        f" {found['hardware']}, blocks of"
        f" {human_bytes(result.block_bytes)} ({model.name})",
        markup=False,
    )
    table = Table("tier")
    for column in ("blocks", "hits", "moved up", "moved down", "link busy", "peak"):
        table.add_column(column, justify="right")
    for tier in found["tiers"]:
        busy = tier["link_busy"]
        table.add_row(
            tier["tier"],
            f"{tier['capacity_blocks']:,}",
            f"{tier['hits']:,}",
            human_bytes(tier["bytes_up"]),
            human_bytes(tier["bytes_down"]),
            "-" if busy is None else f"{busy:.1%}",
            human_bytes(tier["peak_bytes"]),
        )
    out.print(table)
    out.print(
        f"computed though found: {found['recomputed']:,} blocks; found nowhere:"
        f" {found['missed']:,}; last copy lost: {found['dropped']:,}"
    )
    if found["refused"]:
        out.print(f"refused, larger than the first tier: {found['refused']:,} requests")
    if found["ttft_s"]:
        ttft, stall = found["ttft_s"], found["stall_s"]
        out.print(
            f"time to first token: mean {ttft['mean']:.3f} s, p50 {ttft['p50']:.3f},"
            f" p95 {ttft['p95']:.3f}; stalled {stall['total']:.1f} s of {found['span_s']:.1f} s,"
            f" computing {found['compute_s']:.1f} s"
        )
    if found["decode"] is not None:
        _show_decode(found["decode"])
    _show_recorded(recorded)
    _warn(result)
    for note in found["notes"]:
        out.print(f"note: {note}", markup=False)
    _show_kept(name)


def _show_decode(found: dict[str, Any]) -> None:
    if not found["decode_steps"]:
        console().print("nothing is decoded: the workload does not say how much was generated")
        return
    ttft, gap = found["ttft_s"], found["time_per_output_token_s"]
    console().print(
        f"decoding too, at most {found['max_batch']} at once: {found['output_tokens_per_s']:,.1f}"
        f" tokens/s, a step mean batch {found['mean_batch']:.1f}; time to first token mean"
        f" {ttft['mean']:.3f} s, p95 {ttft['p95']:.3f}; between tokens mean"
        f" {gap['mean'] * 1e3:.2f} ms, p95 {gap['p95'] * 1e3:.2f}"
    )
    if (l2 := found["l2"]) is not None:
        console().print(
            f"L2 of {human_bytes(l2['capacity'])} (arithmetic): a step reads"
            f" {human_bytes(round(l2['bytes_per_step']))}, of which it can serve at most"
            f" {l2['most_from_l2']:.2%}"
        )


def _show_recorded(recorded: RecordedTimes) -> None:
    if recorded.ttft_s is not None:
        pace = recorded.tokens_per_s
        console().print(
            f"recorded: time to first token mean {recorded.ttft_s:.3f} s"
            + ("" if pace is None else f", decoding {pace:,.1f} tokens/s")
        )


def _show_kept(name: str) -> None:
    console().print(f"kept as {name}: see the viewer's page Tiers, or tables tier_*", markup=False)


def show_tokens(name: str, result: TokenResult) -> None:
    """Print a token placement."""
    out = console()
    found = result.to_json()
    out.print(
        f"{found['decoded_tokens']:,} decoded tokens in {found['decode_steps']:,} steps on"
        f" {found['hardware']}, placed by {found['replay']}",
        markup=False,
    )
    table = Table("tier")
    for column in ("peak", "mean", "moved up", "moved down"):
        table.add_column(column, justify="right")
    for tier in found["tiers"]:
        sizes = (tier[key] for key in ("peak_bytes", "mean_bytes", "bytes_up", "bytes_down"))
        table.add_row(tier["tier"], *(human_bytes(round(size)) for size in sizes))
    out.print(table)
    if found["decode_steps"]:
        out.print(
            f"attention: {found['retained_mass']:.4f} on hot keys, {found['late_mass']:.4f} served"
            f" late, {found['lost_mass']:.4f} left below"
        )
        stall = found["stall_s"]
        out.print(
            f"{found['fetched_slots']:,} slots fetched; stalled {stall['total'] * 1e3:.3f} ms of"
            f" {(found['compute_s'] + stall['total']) * 1e3:.1f} ms; a step mean"
            f" {stall['mean'] * 1e6:.1f} us, p95 {stall['p95'] * 1e6:.1f}"
        )
    if found["recorded_tokens_per_s"]:
        out.print(
            f"decoding {found['tokens_per_s']:,.1f} tokens/s, recorded"
            f" {found['recorded_tokens_per_s']:,.1f}"
        )
    for note in found["notes"]:
        out.print(f"note: {note}", markup=False)
    _show_kept(name)


def _warn(result: TierResult) -> None:
    """Say where waiting, not the tiers, makes the times."""
    arrivals = int(result.arrival_ns[-1] - result.arrival_ns[0]) if len(result.arrival_ns) else 0
    if result.span_ns > 1.2 * arrivals > 0:
        console().print(
            f"note: more comes in than one machine computes: the last first token is"
            f" {result.span_ns / arrivals:.1f} times as late as the last arrival, and times to the"
            " first token are mostly waiting; compare computing and stalls instead"
        )
