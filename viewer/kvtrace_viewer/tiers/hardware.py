"""A machine's memory tiers: read from TOML files, shipped or the user's own."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvtrace.errors import InputError

_PRICES = {"dollars_per_gb_hour", "price_source"}
_TIER = {"name", "capacity", "read", "write", "latency", "source"} | _PRICES
_FILE = {"name", "compute", "tier", "l2"}


@dataclass(frozen=True)
class Tier:
    """One memory.

    Attributes
    ----------
    name : str
        HBM, DRAM, ...
    capacity : int
        Bytes.
    read, write : float
        Bytes per second, out of it and into it, over its link to the tier above; of the first
        tier, which has none above, its own bandwidth.
    latency : float
        Seconds that pass before the first byte of a transfer.
    source : str
        Where the figures are from.
    dollars_per_gb_hour : float or None
        What 10^9 bytes cost for an hour, where the file gives it.
    price_source : str
        Where the price is from.
    """

    name: str
    capacity: int
    read: float
    write: float
    latency: float
    source: str
    dollars_per_gb_hour: float | None = None
    price_source: str = ""

    @property
    def cost_per_hour(self) -> float | None:
        """Dollars per hour of its capacity; None without a price."""
        if self.dollars_per_gb_hour is None:
            return None
        return self.capacity / 1e9 * self.dollars_per_gb_hour


@dataclass(frozen=True)
class L2:
    """The GPU's second-level cache: its bytes, and where the figure is from."""

    capacity: int
    source: str


@dataclass(frozen=True)
class Hardware:
    """The tiers of a machine, the fastest first, and how fast it computes.

    Attributes
    ----------
    name : str
        For people.
    tiers : tuple of Tier
        At least two; what moves between two that are not neighbours is staged through those
        between them.
    flops : float
        Floating point operations per second reached in prefill; 0 where unknown.
    l2 : L2 or None
        No tier: only the arithmetic of `decode.l2_reuse` asks for it.
    """

    name: str
    tiers: tuple[Tier, ...]
    flops: float = 0.0
    l2: L2 | None = None

    def with_figure(self, tier: str, **figures: float) -> Hardware:
        """The same machine with other figures of one tier.

        Raises
        ------
        InputError
            For a tier that it does not have.
        """
        names = [one.name for one in self.tiers]
        if tier.lower() not in [name.lower() for name in names]:
            raise InputError(
                f"tier {tier!r} is unknown; one of {', '.join(names)} was expected; see the"
                " hardware file"
            )
        changed: dict[str, Any] = dict(figures)
        return replace(
            self,
            tiers=tuple(
                replace(one, **changed, source="given by hand")
                if one.name.lower() == tier.lower()
                else one
                for one in self.tiers
            ),
        )


def shipped() -> dict[str, str]:
    """The machines that come with kvtrace: name in `--tiers`, and what it stands for."""
    folder = files(__package__).joinpath("hardware")
    found = {}
    for one in sorted(folder.iterdir(), key=lambda one: one.name):
        if one.name.endswith(".toml"):
            found[one.name.removesuffix(".toml")] = str(tomllib.loads(one.read_text())["name"])
    return found


def read_hardware(name: str) -> Hardware:
    """Read a machine's tiers from a TOML file, or by the name of one that is shipped.

    Raises
    ------
    InputError
        Where there is no such file, or what is wrong in it.
    """
    if name in shipped():
        text = files(__package__).joinpath("hardware", f"{name}.toml").read_text()
        return _parse(name, text)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{name} cannot be read ({error}); a TOML file of tiers or one of"
            f" {', '.join(shipped())} was expected; kvtrace tiers calibrate > {name} makes one"
        ) from error
    return _parse(name, text)


def _parse(name: str, text: str) -> Hardware:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} is no TOML: {error}; see docs/tiers.md for the form") from error
    unknown = sorted(set(found) - _FILE)
    if unknown:
        raise _wrong(name, f"{unknown[0]!r}", f"one of {', '.join(sorted(_FILE))}")
    listed = found.get("tier")
    if not isinstance(listed, list) or len(listed) < 2:
        raise _wrong(name, "fewer than two [[tier]]", "a tier to compute from and one below it")
    tiers = tuple(_tier(name, number, one) for number, one in enumerate(listed))
    if len({tier.name.lower() for tier in tiers}) < len(tiers):
        raise _wrong(name, "two tiers of one name", "names that tell them apart")
    compute = found.get("compute", {})
    flops = _number(name, "compute.bf16_flops", compute.get("bf16_flops", 0.0), 0)
    share = _number(name, "compute.utilisation", compute.get("utilisation", 1.0), 0)
    l2 = found.get("l2")
    if l2 is not None:
        size = _number(name, "l2.capacity", l2.get("capacity"), 1)
        l2 = L2(int(size), str(l2.get("source", "not said")))
    return Hardware(str(found.get("name", name)), tiers, flops * share, l2)


def _tier(name: str, number: int, one: dict[str, Any]) -> Tier:
    where = f"tier {one.get('name', number)}"
    if set(one) - _TIER or {"name", "capacity", "read", "write"} - set(one):
        raise _wrong(name, f"{where} with {', '.join(sorted(one))}", ", ".join(sorted(_TIER)))
    figures = {
        key: _number(name, f"{where}: {key}", one.get(key, 0), 0 if key == "latency" else 1)
        for key in ("capacity", "read", "write", "latency")
    }
    price = one.get("dollars_per_gb_hour")
    return Tier(
        str(one["name"]),
        int(figures["capacity"]),
        figures["read"],
        figures["write"],
        figures["latency"],
        str(one.get("source", "not said")),
        _number(name, f"{where}: dollars_per_gb_hour", price, 0) if price is not None else None,
        str(one.get("price_source", "")),
    )


def _number(name: str, what: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise _wrong(name, f"{what} = {value!r}", f"a number of at least {least:g}")
    return float(value)


def _wrong(name: str, found: str, expected: str) -> InputError:
    return InputError(
        f"{name} has {found}; {expected} was expected; see docs/tiers.md for the form"
    )
