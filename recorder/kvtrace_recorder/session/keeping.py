"""What a step keeps: what was asked for, thinned so that the trace stays below its bytes.

The rule. A trace may hold `max_bytes` of arrays and rows, before compression. While it grows, less
and less is kept, one level after the other, and never more again:

0. what was asked for;
1. of a prompt's queries only the last 64 (with what the keys received, see `taps.received`);
2. no values;
3. every second of the layers that are still kept goes, but the first and the last; and again, until
   only those two are left;
4. no rows: steps and cache events only.

A level may fill half of what the levels before it left, so that there is always room for the next
ones; the last level with rows may fill everything. A step that would go beyond its level's share,
by the shapes of its layers, is kept at the next level, before anything of it is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from kvtrace.console import human_bytes
from kvtrace.layout import DETAIL_ARRAYS
from kvtrace.model import number_text
from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import Gap
from kvtrace_recorder.selection import LAST_QUERIES, Queries, Selection
from kvtrace_recorder.session.projections import MOST_BYTES, output_projections
from kvtrace_recorder.taps.guard import UnrecordableError

UNSUMMED = (
    "what keys receive is summed from a prompt's first token on, and the first tokens of this"
    " request's were another's, or came before the queries were thinned"
)
#: Bytes that tables hold of a row.
ROW_BYTES = 64


@dataclass(frozen=True)
class Plan:
    """What a step keeps.

    Attributes
    ----------
    kinds : frozenset of str
        Row arrays: of q, k, v, key_norm, value_norm, received.
    queries : Queries
        Of the prompt.
    halvings : int
        How often every second layer went.
    """

    kinds: frozenset[str]
    queries: Queries
    halvings: int = 0

    def layers(self, model: list[int]) -> list[int]:
        """Which of a model's layers are kept, ascending."""
        kept = list(model)
        for _ in range(self.halvings):
            kept = [layer for at, layer in enumerate(kept) if at % 2 == 0 or at == len(kept) - 1]
        return kept

    def kinds_of(self, layer: int, model: list[int]) -> frozenset[str]:
        """What is kept of a layer, given all of the model's."""
        if self.halvings and layer not in self.layers(model):
            return frozenset()
        return self.kinds

    @property
    def sums(self) -> bool:
        """Whether what the prompt's keys received is summed at the tap."""
        return "received" in self.kinds or ("q" in self.kinds and not self.queries.is_all)

    def nbytes(self, specs: Mapping[int, LayerSpec], rows: int, queries: int, itemsize: int) -> int:
        """Bytes of a step of `rows` rows of which `queries` keep their query."""
        kept = [specs[layer] for layer in self.layers(sorted(specs))]
        return rows * ROW_BYTES + sum(self._layer_bytes(x, rows, queries, itemsize) for x in kept)

    def _layer_bytes(self, spec: LayerSpec, rows: int, queries: int, itemsize: int) -> int:
        q_width = spec.num_q_heads * (spec.head_dim * itemsize + 4)
        widths = {
            "k": spec.num_kv_heads * spec.head_dim * itemsize,
            "v": spec.num_kv_heads * spec.value_dim * itemsize,
            "key_norm": spec.num_kv_heads * 4,
            "value_norm": spec.num_kv_heads * 4,
        }
        found = rows * sum(widths.get(kind, 0) for kind in self.kinds)
        if "q" in self.kinds:
            found += queries * q_width
        # Rounded up for decoded tokens, which receive nothing.
        return found + (rows * spec.num_q_heads * 4 if self.sums else 0)


class Keeper:
    """Decides what each step keeps; shared by the threads of a recording.

    Parameters
    ----------
    selection : Selection
        What was asked for.
    detail, dtype : str
        Likewise.
    note : callable
        Told of each thinning.
    """

    def __init__(
        self, selection: Selection, *, detail: str, dtype: str, note: Callable[[Gap], None]
    ) -> None:
        self.selection = selection
        kinds = frozenset(DETAIL_ARRAYS[detail]) - {"lse"}
        #: Whether anything of a row is kept.
        self.has_rows = bool(kinds)
        # Of events alone nothing could be thinned.
        self._limit = selection.max_bytes if kinds else None
        self.dtype = dtype
        self._itemsize = 2 if dtype == "float16" else 4
        self._note = note
        # A signal's handler may end the recording in the middle of this.
        self._lock = threading.RLock()
        self._level = 0
        self._spent = 0
        self._share = 0.0
        self._stopped = False
        #: Requests whose prompts are summed from the first token on, and that cannot be.
        self._summed: set[int] = set()
        self._unsummed: set[int] = set()
        self._plans = _levels(Plan(kinds, selection.queries))

    def plan(
        self, specs: Mapping[int, LayerSpec], rows: int, queries: Callable[..., int]
    ) -> tuple[Plan, int]:
        """What a step keeps, and the bytes that it takes.

        Parameters
        ----------
        specs : mapping of int to LayerSpec
            The layers of the model that were asked for.
        rows : int
            Rows of the step.
        queries : callable
            Given `Queries`, how many of the rows keep their query.

        Raises
        ------
        UnrecordableError
            Where the trace is full.
        """
        limit = self._limit
        if limit is None:
            return self._plans[0], 0
        with self._lock:
            while True:
                if self._stopped:
                    raise UnrecordableError(self._full())
                plan = self._plans[self._level]
                nbytes = plan.nbytes(specs, rows, queries(plan.queries), self._itemsize)
                self._share = self._share_of(limit, specs)
                if self._spent + nbytes <= self._share:
                    self._spent += nbytes
                    return plan, nbytes
                self._thin(specs, nbytes, queries)

    def asks(self, layer: int) -> bool:
        """Whether a layer is among those asked for."""
        return self.selection.layers is None or layer in self.selection.layers

    def output_projections(self, model: Any) -> NDArray[Any] | None:
        """A model's output projections, where values are kept with which they make a signal."""
        if "v" not in self._plans[0].kinds:
            return None
        # Of the default limit of 4 GiB as much as without any: 64 MiB.
        most = MOST_BYTES if self._limit is None else self._limit // 64
        found = output_projections(model, self.dtype, most)
        if found is not None:
            with self._lock:
                self._spent += found.nbytes
        return found

    def unknown_layers(self, model: Mapping[str, Any]) -> str | None:
        """What to say where layers were asked for that a model (columns of `models`) lacks."""
        count = int(model.get("num_layers") or 0)
        asked = self.selection.layers
        missing = [] if asked is None or not count else sorted(x for x in asked if x >= count)
        if not missing:
            return None
        return (
            f"layers {number_text(missing)} were asked for; {model['architecture']} has"
            f" {number_text(range(count))}"
        )

    def sums(self, request: int, position: int) -> bool:
        """Whether to sum what keys receive from a request's prompt, of which `position` comes next.

        Only what is summed from the first token on is what the keys received.
        """
        with self._lock:
            if position == 0:
                self._summed.add(request)
            elif request not in self._summed and request not in self._unsummed:
                self._unsummed.add(request)
                self._note(Gap("prompts' received attention", 1, UNSUMMED))
            return request in self._summed

    def repeat(self, plan: Plan | None, nbytes: int) -> bool:
        """Whether a step may keep the same as the last one, of as many bytes."""
        if self._limit is None:
            return True
        with self._lock:
            same = plan is self._plans[self._level] and self._spent + nbytes <= self._share
            if same:
                self._spent += nbytes
            return same

    def _share_of(self, limit: int, specs: Mapping[int, LayerSpec]) -> float:
        """Bytes that the trace may have at this level."""
        return limit if self._is_last(specs) else limit * (1 - 0.5 ** (self._level + 1))

    def _is_last(self, specs: Mapping[int, LayerSpec]) -> bool:
        if self._level + 1 < len(self._plans):
            return False
        return len(self._plans[-1].layers(sorted(specs))) <= 2

    def _thin(
        self, specs: Mapping[int, LayerSpec], nbytes: int, queries: Callable[..., int]
    ) -> None:
        """Go one level down, for a step of so many bytes, and say so."""
        before = self._plans[self._level]
        if self._is_last(specs):
            self._stopped = True
            return
        if self._level + 1 == len(self._plans):
            self._plans.append(replace(before, halvings=before.halvings + 1))
        self._level += 1
        now = self._plans[self._level]
        if now.queries != before.queries:
            count = queries(before.queries) - queries(now.queries)
            self._say(
                "prompt queries", count, nbytes, f"only the last {LAST_QUERIES} of a prompt's"
            )
        elif now.kinds != before.kinds:
            self._say("layers' v", len(before.layers(sorted(specs))), nbytes, "no values")
        else:
            model = sorted(specs)
            gone = sorted(set(before.layers(model)) - set(now.layers(model)))
            kept = ", ".join(map(str, now.layers(model)))
            self._say("layers", len(gone), nbytes, f"only layers {kept}")

    def _say(self, what: str, count: int, nbytes: int, kept: str) -> None:
        limit = self._limit or 0
        self._note(
            Gap(
                what,
                count,
                f"{human_bytes(self._spent)} of max_bytes {human_bytes(limit)} were used and a step"
                f" of {human_bytes(nbytes)} came: from it on {kept} are kept",
            )
        )

    def _full(self) -> str:
        return (
            f"the trace holds its max_bytes, {human_bytes(self._limit or 0)} before compression:"
            " no further rows are kept"
        )


def _levels(asked: Plan) -> list[Plan]:
    """The levels but the halvings, which go on as long as there are layers."""
    found = [asked]
    if "q" in asked.kinds and asked.queries.is_wider_than(LAST_QUERIES):
        found.append(replace(asked, queries=replace(asked.queries, last=LAST_QUERIES)))
    if "v" in asked.kinds:
        found.append(replace(found[-1], kinds=found[-1].kinds - {"v"}))
    return found
