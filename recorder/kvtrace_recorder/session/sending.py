"""How held rows go out: into a slab and to the pipeline, or, where they cannot, as a gap.

Whatever goes wrong on the way (no room, no memory, a copy that fails, an interrupt in the middle),
the steps are sent with the reason in place of their rows, the slab is given back, and no later
rows of their requests follow: they would stand behind a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from kvtrace_recorder.layer_rows import LayerRows
from kvtrace_recorder.messages import DecodeSteps, StepBatch
from kvtrace_recorder.pipeline import Pipeline
from kvtrace_recorder.session.copies import LayerParts, RowChoice
from kvtrace_recorder.session.decode import DecodeRun
from kvtrace_recorder.session.off_device import OffDevice, Ran
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.guard import TapGuard
from kvtrace_recorder.taps.keep import DTYPES
from kvtrace_recorder.writer.slabs import Slab

if TYPE_CHECKING:
    from kvtrace_recorder.session.held import Held

NAME = "copies"
INTERRUPTED = "the recording was ended while these rows were on their way"


class Parcel(Protocol):
    """Some steps of one cache, on their way."""

    @property
    def nbytes(self) -> int:
        """Room that their rows take in a slab; 0 where there are none."""

    @property
    def is_off_host(self) -> bool:
        """Whether rows lie on a device."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that `copy` reads of a device."""

    @property
    def ran(self) -> Ran | None:
        """What the last of the steps left on its devices; None where all lies on the host."""

    @property
    def lost(self) -> str | None:
        """Why rows before these were not sent; None where they were."""

    def copy(self, slab: Slab) -> None:
        """Copy the rows."""

    def refuse(self, reason: str) -> int:
        """Send the steps without rows, and none of their requests after them; how many rows."""

    @property
    def message(self) -> StepBatch | DecodeSteps:
        """The steps, with rows where `copy` was called."""


class HeldParcel:
    """Held steps that went the general way."""

    def __init__(self, held: Held, dtype: torch.dtype) -> None:
        self._held, self._dtype = held, dtype
        records = [step.record for step in held.steps]
        self.message = StepBatch(held.steps[0].model.info.key, records)
        self._rows = rows = held.rows
        layers = held.layers.values() if rows.count else ()
        self.nbytes = sum(parts.nbytes(rows, dtype) for parts in layers)
        if not self.nbytes:
            self.message.layers = [LayerRows(parts.spec) for parts in layers]
        self.is_off_host, self.ran = bool(held.devices), held.ran

    @property
    def tensors(self) -> list[torch.Tensor]:
        """As `Parcel`."""
        return [tensor for parts in self._held.layers.values() for tensor in parts.tensors]

    @property
    def lost(self) -> str | None:
        """As `Parcel`: what was lost for another reason was so before a step was held."""
        return None

    @torch.no_grad()
    def copy(self, slab: Slab) -> None:
        """As `Parcel`."""
        layers = self._held.layers.values()
        self.message.layers = [x.copy(slab, self._rows, self._dtype) for x in layers]

    def refuse(self, reason: str) -> int:
        """As `Parcel`."""
        self.message.layers = []
        return refuse(self._held.steps, reason)


class RunParcel:
    """Steps of a run of plain decode steps."""

    def __init__(self, run: DecodeRun, dtype: torch.dtype) -> None:
        self._run = run
        self._steps, self._rows = run.take(dtype)
        self.message: StepBatch | DecodeSteps = self._steps
        self.nbytes = self._rows.nbytes
        self.is_off_host, self.ran = bool(run.devices), run.ran
        if not self.nbytes:
            self._steps.layers = self._rows.empty

    @property
    def tensors(self) -> list[torch.Tensor]:
        """As `Parcel`."""
        return self._rows.tensors

    @property
    def lost(self) -> str | None:
        """As `Parcel`: while a run goes on nothing else loses its requests."""
        return self._run.entry.reason

    def copy(self, slab: Slab) -> None:
        """As `Parcel`."""
        self._rows.copy(slab, self._steps)

    def refuse(self, reason: str) -> int:
        """As `Parcel`."""
        batch = self._steps.batch({})
        for record in batch.steps:
            record.fault = reason
        self._run.entry.lose(reason)
        self.message = batch
        return self._steps.num_rows


class Sender:
    """Sends what was held; one thread at a time.

    Parameters
    ----------
    open_pipeline : callable
        Gives the pipeline that takes the messages.
    dtype : str
        Storage type.
    guard : TapGuard
        Takes errors of the copies.
    """

    def __init__(self, open_pipeline: Callable[[], Pipeline], dtype: str, guard: TapGuard) -> None:
        self._open_pipeline = open_pipeline
        self.dtype = DTYPES[dtype]
        self._guard = guard
        self.off_device = OffDevice()
        #: What is being sent.
        self._parcel: Parcel | None = None

    @property
    def _pipeline(self) -> Pipeline:
        return self._open_pipeline()

    def send(self, parcel: Parcel) -> None:
        """Send some steps, with their rows where that can be done."""
        if not parcel.nbytes:
            self._pipeline.put(parcel.message)
            return
        self._parcel, slab, reason = parcel, None, parcel.lost
        try:
            if reason is None:
                slab = self._guard.run(NAME, self._filled, parcel)
        except BaseException as error:
            # An interrupt, which the program may go on after; or the recording is strict.
            reason = f"{type(error).__name__} came while these rows were copied"
            raise
        finally:
            self._parcel = None
            if slab is None:
                self._refuse(parcel, reason or self.refusal)
            else:
                self._pipeline.put(parcel.message, [slab])

    def interrupted(self) -> None:
        """The recording ends, in a signal's handler it may be, and what is half sent will not go.

        Else the trace would be called whole.
        """
        if self._parcel is not None:
            parcel, self._parcel = self._parcel, None
            self._refuse(parcel, INTERRUPTED)

    def copy_layer(
        self, step: ActiveStep, parts: LayerParts, *, admitted: bool, layers: int
    ) -> None:
        """Copy the rows of one layer of a large step, which is sent when it has ended.

        Parameters
        ----------
        step : ActiveStep
            The step.
        parts : LayerParts
            The layer's.
        admitted : bool
            Whether it needs to wait for no room.
        layers : int
            How many layers the step will have.
        """
        rows = RowChoice.of([step])
        nbytes = parts.nbytes(rows, self.dtype)
        if not nbytes:
            step.layers.append(LayerRows(parts.spec))
            return
        slab = self._pipeline.reserve(nbytes, admitted, nbytes * layers)
        if slab is None:
            self._pipeline.dropped_tokens += refuse([step], self.refusal)
            return
        step.slabs.append(slab)
        if parts.devices:
            with self.off_device.gathering(slab, parts.tensors, None):
                step.layers.append(parts.copy(slab, rows, self.dtype))
        else:
            step.layers.append(parts.copy(slab, rows, self.dtype))

    @property
    def refusal(self) -> str:
        """Why rows cannot be sent."""
        return self._guard.silent.get(NAME) or self._pipeline.refusal

    def _filled(self, parcel: Parcel) -> Slab | None:
        slab = self._pipeline.reserve(parcel.nbytes)
        if slab is None:
            return None
        try:
            if parcel.is_off_host:
                with self.off_device.gathering(slab, parcel.tensors, parcel.ran):
                    parcel.copy(slab)
            else:
                parcel.copy(slab)
        except BaseException:
            # Else the room would be missing for good, and who waits for it would wait for ever.
            self._pipeline.give_back([slab])
            raise
        return slab

    def _refuse(self, parcel: Parcel, reason: str) -> None:
        self._pipeline.dropped_tokens += parcel.refuse(reason)
        self._pipeline.put(parcel.message)


def refuse(steps: Sequence[ActiveStep], reason: str) -> int:
    """Let the rows of some steps, and all later ones of their requests, be a gap; how many rows."""
    count = 0
    for step in steps:
        if step.record.fault is None:
            count += step.record.num_tokens
            step.record.fault = reason
        step.entry.lose(reason)
    return count
