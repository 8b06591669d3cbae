"""`record`: the recorder as a context manager."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvtrace.errors import InputError, TraceError
from kvtrace.layout import DETAIL_ARRAYS, rank_directory
from kvtrace.numbers import Numbers
from kvtrace.writer import check_choice
from kvtrace_recorder.distributed import environment_launch, environment_rank
from kvtrace_recorder.first_call import FirstCall
from kvtrace_recorder.imports import AfterImport
from kvtrace_recorder.messages import Gap
from kvtrace_recorder.pipeline import Pipeline
from kvtrace_recorder.selection import (
    MAX_BYTES,
    Selection,
    check_verify,
    parse_selection,
)
from kvtrace_recorder.session import active
from kvtrace_recorder.session.training import Training
from kvtrace_recorder.session.versions import library_versions
from kvtrace_recorder.tokens.texts import TokenTexts

if TYPE_CHECKING:
    from kvtrace_recorder.session.session import Session
    from kvtrace_recorder.taps.patch import Restorable

#: Bytes that may wait for the writer.
QUEUE_BYTES = 128 << 20


def record(
    model: Any,
    path: str | os.PathLike[str],
    *,
    detail: str = "qkv",
    dtype: str = "float16",
    layers: Numbers = None,
    heads: Numbers = None,
    queries: str = "all",
    max_bytes: int | str | None = MAX_BYTES,
    verify: bool = False,
    tokenizer: Any = None,
    force: bool = False,
    durable: bool = False,
    strict: bool = False,
    on_full: str = "drop",
    queue_bytes: int = QUEUE_BYTES,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
) -> Recording:
    """Record what a model does with its KV cache while the `with` block runs.

    Nothing is patched before the block is entered, and everything is put back when it is left,
    however it is left. The model's outputs stay bit-identical. A forked child is not recorded.

    Under torchrun and its like (RANK and WORLD_SIZE in the environment) all processes that give
    the same path record into one trace, each as the rank that it is.

    Parameters
    ----------
    model : torch.nn.Module or None
        A transformers model, a module that contains one, or any other module: the steps of that
        are its forward calls, and its requests their batch rows. None: every transformers model
        that runs in this process while the block does, from its first forward pass on.
    path : path-like
        The trace directory to make, usually `NAME.kvtrace`.
    detail : {"qkv", "qk", "summary", "events"}
        Queries, keys and values; without values; norms of each key and value and the attention
        that each key of a prompt received; or tokens, steps and cache events only.
    dtype : {"float16", "float32"}
        Storage type of q, k and v.
    layers, heads : str or sequence of int, optional
        Only these layers, and only these KV heads of each with their query heads: "0,4-7".
    queries : str
        Of a prompt only these queries: "last=64", "every=8" or "all". Every later token's is kept.
        Where some are left out, what each key received from all of them is computed and kept.
    max_bytes : int or str, optional
        Bytes of rows before compression, such as "4GiB" (of each recording process); None is no
        limit. While the trace grows, less of each step is kept, each change noted in table `gaps`;
        the rule is `kvtrace_recorder.session.keeping`'s.
    verify : bool
        When the recording ends, recompute a sample of attention outputs from the trace and compare
        them with the model's own: the errors go to table `verifications`. Needs detail qkv.
    tokenizer : transformers tokenizer, optional
        Gives tokens their text; by default the model's own where it lies on this machine.
    force : bool
        Replace an existing trace at `path`.
    durable : bool
        Let every commit outlive a power cut: files reach the disk before the journal says that
        they are there. By default a commit outlives the death of the processes.
    strict : bool
        Let an error inside the recorder reach the model. By default it is reported once, noted in
        the trace, and the model goes on.
    on_full : {"drop", "wait"}
        What happens while the disk is slower than the model: drop whole steps (and the rest of
        their requests), counted in table `gaps`, or let the model wait.
    queue_bytes : int
        Bytes of steps that may wait for the writer.
    progress : bool, optional
        A progress line on standard error; by default where that is a terminal.
    command : sequence of str, optional
        Kept in the trace as the command that made it; by default this process's.

    Returns
    -------
    Recording
        To be entered; see there for what it counts.

    Raises
    ------
    TraceError
        On entering, where `path` exists and may not be replaced or joined, or another recording
        runs.
    InputError
        For an unknown detail, dtype, selection or on_full, and for a model that is no
        torch.nn.Module.
    """
    check_choice("detail", detail, DETAIL_ARRAYS)
    check_choice("dtype", dtype, ("float16", "float32"))
    check_verify(verify, detail)
    check_choice("on_full", on_full, ("drop", "wait"))
    if model is not None:
        _check_model(model)
    return Recording(
        model,
        # A program may change its directory while it is recorded.
        Path(path).absolute(),
        detail=detail,
        dtype=dtype,
        selection=parse_selection(layers, heads, queries, max_bytes),
        verify=verify,
        texts=TokenTexts(tokenizer),
        force=force,
        durable=durable,
        strict=strict,
        on_full=on_full,
        queue_bytes=queue_bytes,
        progress=progress,
        command=list(sys.argv if command is None else command),
    )


class Recording:
    """A recording that can be entered once; made by `record`."""

    def __init__(
        self,
        model: Any,
        path: Path,
        *,
        detail: str,
        dtype: str,
        selection: Selection,
        verify: bool,
        texts: TokenTexts,
        force: bool,
        durable: bool,
        strict: bool,
        on_full: str,
        queue_bytes: int,
        progress: bool | None,
        command: Sequence[str],
    ) -> None:
        self.path = path
        #: Set to False inside the block where what ran did not reach its end.
        self.complete = True
        self._model = model
        self._detail, self._dtype, self._selection = detail, dtype, selection
        self._verify = verify
        self._texts = texts
        self._force, self._durable, self._strict = force, durable, strict
        self._on_full, self._queue_bytes, self._progress = on_full, queue_bytes, progress
        self._command = command
        self._launch: str | None = None
        self._on_fork: Callable[[], None] | None = None
        self._training = Training()
        self._pid: int | None = None
        self._opening = threading.RLock()
        # SIGTERM ends a recording in a thread of its own, at the program's end it may be.
        self._ending = threading.RLock()
        self._is_over = False
        self._pipeline: Pipeline | None = None
        self._session: Session | None = None
        self._patches: list[Restorable] = []
        self._waiting: AfterImport | None = None
        self._called: FirstCall | None = None

    @property
    def rows(self) -> int:
        """Tokens recorded so far, over all requests."""
        return self._opened.status.rows

    @property
    def steps(self) -> int:
        """Forward passes seen so far."""
        return self._opened.status.steps

    @property
    def requests(self) -> int:
        """Requests recorded so far."""
        return self._opened.status.requests

    @property
    def dropped_tokens(self) -> int:
        """Tokens of steps that were dropped: the queue was full, or the writer failed."""
        return self._opened.dropped_tokens

    @property
    def writer_pid(self) -> int | None:
        """Process that writes the trace; None where a thread of this one does."""
        return self._opened.writer_pid

    @property
    def gaps(self) -> dict[str, int]:
        """What the trace does not hold: how much, by reason."""
        return dict(self._opened.status.reasons)

    @property
    def training_step(self) -> int:
        """Optimizer steps taken before; set it where torch's optimizers do not tell.

        By default the steps of torch's optimizers since the recording began are counted (of
        several the busiest's). A loop that goes on from a checkpoint, or whose optimizer is none
        of torch's, sets it at each step.
        """
        return self._training.step

    @training_step.setter
    def training_step(self, number: int) -> None:
        self._training.step = number

    def sample(self, every: int, sequences: int = 1) -> None:
        """From here on, record samples of a training and nothing else.

        Parameters
        ----------
        every : int
            Of the training passes (model in training mode, gradients on) the first and every
            N-th after it are recorded. Where `training_step` is set, the first pass of each
            training step that N divides.
        sequences : int
            So many sequences of each recorded batch, from its first on, are kept.

        Raises
        ------
        InputError
            For numbers below 1.
        """
        self._training.sample(every, sequences)

    def __enter__(self) -> Self:
        if self._pid is not None:
            raise TraceError(
                f"the recording into {self.path} was entered before; a new one was expected;"
                " call record() again"
            )
        active.begin(self)
        self._pid = os.getpid()
        try:
            self._start()
        except BaseException:
            active.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid:
            # A forked child leaves the block too; the recording is its parent's.
            return
        with self._ending:
            if not self._is_over:
                self._is_over = True
                self._end(finished=error is None)

    def join(self, launch: str, on_fork: Callable[[], None]) -> None:
        """Before entering: be one process of several that `kvtrace record` has launched.

        Parameters
        ----------
        launch : str
            Whose trace this process joins, at its first step.
        on_fork : callable
            Called in a forked child once this recording has been left to the parent.
        """
        self._launch, self._on_fork = launch, on_fork

    def leave_to_parent(self) -> None:
        """In a forked child: no tap and no trace, and what `on_fork` does instead."""
        self._remove_taps()
        if self._on_fork is not None:
            self._on_fork()

    @property
    def _opened(self) -> Pipeline:
        if self._pipeline is None:
            raise TraceError(
                f"the recording into {self.path} has not begun; a running one was expected;"
                " enter it with `with`"
            )
        return self._pipeline

    def _start(self) -> None:
        if self._launch is None:
            self._open()
        try:
            # The cache classes are imported before the models', so this is late enough.
            self._waiting = AfterImport("transformers.modeling_utils", self._install_taps)
            self._waiting.install()
            if self._finds_plain and self._session is None:
                self._called = FirstCall(self._import_taps)
                self._called.install()
        except BaseException:
            self._remove_taps()
            if self._pipeline is not None:
                self._pipeline.close(complete=False)
            raise

    def _open(self) -> Pipeline:
        """The pipeline, which makes this process's part of the trace when it is first needed."""
        with self._opening:
            if self._pipeline is None:
                options = {
                    "path": str(self.path),
                    "command": list(self._command),
                    "detail": self._detail,
                    "dtype": self._dtype,
                    "selection": self._selection.to_json(),
                    "force": self._force,
                    "durable": self._durable,
                    "versions": library_versions(),
                    "pid": os.getpid(),
                    "rank": self._rank(),
                    "launch": self._launch or environment_launch(),
                }
                self._pipeline = Pipeline(
                    options,
                    self._texts,
                    queue_bytes=self._queue_bytes,
                    on_full=self._on_full,
                    progress=self._progress,
                    on_tick=self._tick,
                )
            return self._pipeline

    def _end(self, *, finished: bool) -> None:
        try:
            if self._session is not None:
                # Before the taps go: a step that runs in another thread would lack some layers.
                self._session.stop()
            self._remove_taps()
            if self._session is not None:
                self._session.finish()
        finally:
            active.end()
            # Another thread may be about to run the first step.
            with self._opening:
                pipeline = self._pipeline
            if pipeline is not None:
                pipeline.close(complete=finished and self.complete)
        self._report(finished=finished)

    def _tick(self) -> None:
        if self._session is not None:
            self._session.tick()

    def _rank(self) -> int | None:
        rank = environment_rank()
        if self._launch is None:
            return rank or 0
        # A worker that its launcher restarted finds its number taken by the one that died.
        is_taken = rank is not None and (self.path / rank_directory(rank)).exists()
        return None if is_taken else rank

    @property
    def _finds_plain(self) -> bool:
        """Whether models that are none of transformers' are looked for: of a launched program."""
        return self._launch is not None and self._model is None

    def _import_taps(self) -> None:
        """A module is called, and nobody has imported transformers, which the taps need."""
        try:
            import transformers.modeling_utils  # noqa: F401
        except Exception as error:  # noqa: BLE001 - the program does not need it
            reason = f"{type(error).__name__}: {error}"
            print(
                f"kvtrace: not recorded: transformers cannot be imported: {reason}", file=sys.stderr
            )

    def _install_taps(self) -> None:
        if self._called is not None:
            self._called.remove()
        try:
            from kvtrace_recorder import taps
            from kvtrace_recorder.session.session import Session

            self._session = Session(
                self._model,
                self._open,
                detail=self._detail,
                dtype=self._dtype,
                selection=self._selection,
                verify=self._verify,
                strict=self._strict,
                training=self._training,
                finds_plain=self._finds_plain,
            )
            for patch in taps.patches(self._session):
                self._patches.append(patch)
                patch.apply()
        except Exception as error:
            # Where this runs inside the user's import of transformers, that must still succeed.
            self._remove_taps()
            if self._strict or self._model is not None:
                raise
            reason = f"the taps could not be installed: {type(error).__name__}: {error}"
            print(f"kvtrace: {reason}", file=sys.stderr)
            self._open().put(Gap("taps", 1, reason))

    def _remove_taps(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
        if self._called is not None:
            self._called.remove()
        for patch in reversed(self._patches):
            patch.restore()
        self._patches = []

    def _report(self, *, finished: bool) -> None:
        pipeline = self._pipeline
        if pipeline is None:
            return
        if pipeline.failure is not None:
            message = f"writing {self.path} failed: {pipeline.failure}; what came before is kept"
            if self._strict and finished:
                raise TraceError(message)
            print(f"kvtrace: {message}", file=sys.stderr)
        silent = not pipeline.status.steps and not pipeline.status.reasons
        if silent and self._model is not None and finished:
            print(
                f"kvtrace: nothing was recorded: the {type(self._model).__name__} did not run, or"
                " ran under torch.compile",
                file=sys.stderr,
            )
        for reason, count in pipeline.status.reasons.items():
            print(f"kvtrace: not recorded ({count:,}): {reason}", file=sys.stderr)


def _check_model(model: Any) -> None:
    import torch

    if isinstance(model, torch.nn.Module):
        # The taps are installed once this is imported, which a user's program may never do.
        import transformers.modeling_utils  # noqa: F401

        return
    raise InputError(
        f"a {type(model).__name__} was given; a torch.nn.Module was expected; load one with"
        " AutoModelForCausalLM.from_pretrained, or build your own"
    )
