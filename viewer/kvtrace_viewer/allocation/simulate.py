"""A continuous-batching server, step by step and block by block, on a workload.

The rules are those of transformers' continuous batching, so that the recorded settings give the
recorded block tables: running requests before waiting ones, prompts in parts where a step is
full, and where a running request finds no block, the newest of those without is preempted.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtrace.errors import KvtraceError
from kvtrace_viewer.allocation.history import EventLog
from kvtrace_viewer.allocation.job import Job, Simulation
from kvtrace_viewer.allocation.pool import BlockPool
from kvtrace_viewer.allocation.settings import Settings
from kvtrace_viewer.allocation.workload import Asked, Workload


def simulate(
    workload: Workload, settings: Settings, progress: Callable[[float], None] | None = None
) -> Simulation:
    """Serve a workload.

    Raises
    ------
    KvtraceError
        Where no request can go on; the rules exclude it.
    """
    server = Server(workload, settings)
    total = len(server.run.jobs)
    while server.left:
        server.step()
        if progress and len(server.run.clock) % 256 == 0:
            progress(1 - server.left / total)
    return server.run


class Server:
    """The state between two steps.

    Parameters
    ----------
    workload : Workload
        Who comes when.
    settings : Settings
        What it is set to.
    """

    def __init__(self, workload: Workload, settings: Settings) -> None:
        known: dict[tuple[int, bytes], int] = {}
        log = EventLog()
        pool = BlockPool(
            settings.pool,
            settings.policy,
            lambda kind, request, block, index: log.add(self.moment, kind, request, block, index),
        )
        jobs, refused = [], {}
        for one in workload.requests:
            if reason := _too_large(one, settings):
                refused[one.request] = reason
            else:
                contents = one.contents(settings.block_size, known)
                jobs.append(Job(one, contents, one.prompt_tokens))
        self.settings, self.pool = settings, pool
        self.run = Simulation(settings, jobs, refused, log)
        self.coming = sorted(jobs, key=lambda job: job.asked.arrival_step)
        self.active: dict[int, Job] = {}
        self.waiting: list[Job] = []
        self.left = len(jobs)
        self.moment = 0
        self.swap_free = settings.swap_blocks
        #: After a preemption nobody is let in until a request has ended.
        self.is_closed = False

    def step(self) -> None:
        """Let come who has come, process one batch, and end what is done."""
        self._arrive()
        batch, starved = self._schedule()
        while not batch:
            if not self._make_room(starved):
                raise KvtraceError(
                    f"no request can go on at step {self.moment}; at least one was expected, since"
                    " none larger than the pool is let in; report this with the trace"
                )
            batch, starved = self._schedule()
        if starved:
            self._make_room(starved)
        for job, count in batch:
            self.run.parts.append((self.moment, job.asked.request, job.position, count))
        self.moment += 1
        for job, count in batch:
            self._process(job, count)

    def _arrive(self) -> None:
        clock = self.run.clock[-1] + 1 if self.run.clock else 0
        if not self.active and not self.waiting and self.coming:
            clock = max(clock, self.coming[0].asked.arrival_step)
        self.run.clock.append(clock)
        while self.coming and self.coming[0].asked.arrival_step <= clock:
            self.waiting.append(self.coming.pop(0))

    def _candidates(self) -> list[Job]:
        running = list(self.active.values())
        decoding = [job for job in running if job.state == "decoding"]
        prefilling = [job for job in running if job.state == "prefilling"]
        if self.settings.scheduler == "prefill_first":
            decoding, prefilling = prefilling, decoding
        return decoding + prefilling + ([] if self.is_closed else self._admission())

    def _admission(self) -> list[Job]:
        keys: dict[str, Callable[[Job], int]] = {
            "fcfs": lambda job: 0,
            "shortest_prompt": lambda job: job.asked.prompt_tokens,
            "shortest_job": lambda job: job.asked.tokens,
            "longest_job": lambda job: -job.asked.tokens,
        }
        ordered = sorted(self.waiting, key=keys[self.settings.admission])
        swapped = [job for job in ordered if job.swapped]
        fresh = [job for job in ordered if not job.swapped]
        # What was copied out is cheap to take back, but must not keep all others out.
        mixed: list[Job] = []
        for i in range(max(len(swapped), len(fresh))):
            mixed += swapped[i : i + 1] + fresh[i : i + 1]
        return mixed

    def _has_margin(self) -> bool:
        self.pool.settle()
        needed = self.settings.safety_margin
        if self.pool.available / self.pool.size >= needed:
            return True
        if self.settings.policy == "all" and self.pool.evict_cached():
            self.pool.settle()
        return self.pool.available / self.pool.size >= needed

    def _schedule(self) -> tuple[list[tuple[Job, int]], list[tuple[Job, int]]]:
        """Choose a batch: requests with the tokens to process, and running ones without a block."""
        batch: list[tuple[Job, int]] = []
        starved: list[tuple[Job, int]] = []
        tokens = self.settings.max_batch_tokens
        reads = self.settings.pool * self.settings.block_size
        has_margin = self._has_margin()
        for job in self._candidates():
            if not has_margin and batch and job.state != "decoding":
                break
            self._find_prefix(job)
            count = min(job.pending, tokens)
            past = job.position
            if reads < past:
                continue
            needed = self._blocks(past + count) - len(job.table)
            if needed > self.pool.available:
                if job.asked.request in self.active:
                    starved.append((job, count))
                continue
            self._begin(job, count, needed)
            batch.append((job, count))
            tokens -= count
            reads -= past
            if tokens == 0 or reads <= 0 or len(batch) == self.settings.max_batch:
                break
        return batch, starved

    def _find_prefix(self, job: Job) -> None:
        if job.state != "waiting" or job.swapped or self.settings.policy == "none":
            return
        # The last token is always processed: its output is wanted.
        most = (job.target - 1) // self.settings.block_size
        blocks = self.pool.match(job.contents[:most])
        for block in blocks:
            self.pool.share(job.asked.request, block, len(job.table))
            job.table.append(block)
        if blocks:
            job.position = len(blocks) * self.settings.block_size
            job.found += job.position
            self._activate(job, "prefilling")

    def _begin(self, job: Job, count: int, needed: int) -> None:
        self.pool.allocate(job.asked.request, job.table, max(0, needed))
        if job.first_step is None:
            job.first_step = self.moment
        if job.swapped:
            self.swap_free += job.swapped
        whole = count == job.pending
        self._activate(job, "decoding" if whole else "prefilling")

    def _activate(self, job: Job, state: str) -> None:
        if job.state == "waiting":
            self.active[job.asked.request] = job
            self.waiting.remove(job)
        job.state = state

    def _process(self, job: Job, count: int) -> None:
        size = self.settings.block_size
        completed = (job.position % size + count) // size
        if job.swapped:
            # What comes back is to be found by its contents again.
            completed += job.position // size
            job.swapped = 0
        job.position += count
        if job.position == job.target:
            job.generated += 1
            job.target += 1
        if job.generated < job.asked.answer_tokens:
            self.pool.complete(job.asked.request, job.table, job.contents, completed)
        else:
            # As in transformers, what the last step completes is not cached.
            self.pool.release(job.asked.request, job.table)
            del self.active[job.asked.request]
            job.end_step = self.moment - 1
            self.left -= 1
            self.is_closed = False

    def _make_room(self, starved: list[tuple[Job, int]]) -> bool:
        """Preempt the newest of the starved until the others fit; whether anything was freed."""
        evicted = self.settings.policy == "all" and self.pool.evict_cached()
        victims: list[Job] = []
        while starved and len(self.active) - len(victims) > 1:
            needs = sum(
                self._blocks(job.position + count) - len(job.table) for job, count in starved
            )
            if needs <= self.pool.available:
                break
            job, _ = starved.pop()
            victims.append(job)
            self._preempt(job)
        for job in reversed(victims):
            del self.active[job.asked.request]
            self.waiting.append(job)
        self.is_closed = self.is_closed or bool(victims)
        return bool(victims) or evicted

    def _preempt(self, job: Job) -> None:
        held = len(job.table)
        job.preemptions += 1
        self.pool.release(job.asked.request, job.table, keep=False)
        if self.settings.preempt == "swap" and held and held <= self.swap_free:
            job.swapped = held
            self.swap_free -= held
            self.run.swapped_out += held
        else:
            job.recomputed += job.position
            job.position = 0
        job.state = "waiting"

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_size)


def _too_large(one: Asked, settings: Settings) -> str | None:
    blocks = -(-one.tokens // settings.block_size)
    if blocks <= settings.pool:
        return None
    return (
        f"{one.name} needs {blocks:,} blocks of {settings.block_size} tokens for its"
        f" {one.tokens:,} tokens; the pool has {settings.pool:,}; it would never end"
    )
