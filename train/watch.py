"""Who still reports: finds the worker that holds up a run, and names it.

A worker that stands still leaves all others waiting for its messages, so none of them can tell by itself which one it
is. Each therefore tells one place, from a thread of its own, how far its training has come (`Pulse`), and there it is
found out who has been silent for too long (`Watch`). No Ray here: train/launch.py carries the messages.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """What a worker tells about itself.

    Parameters
    ----------
    attempt
        The start of the worker group that it belongs to.
    moves
        How often its training has got on.
    place
        Where its training is.
    waiting
        It waits for other workers.
    """

    attempt: str
    rank: int
    size: int
    node: str
    pid: int
    moves: int
    place: str
    waiting: bool


@dataclass
class _Worker:
    beat: Beat
    heard: float
    moved: float

    def __str__(self) -> str:
        return f"worker {self.beat.rank} (node {self.beat.node}, process {self.beat.pid})"


class Watch:
    """Hears the workers of one attempt after the other.

    Parameters
    ----------
    timeout_s
        Seconds without a sign, or without progress, after which a worker is named.
    clock
        Seconds; replaced in tests.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout_s, clock
        self._workers: dict[int, _Worker] = {}
        self._attempts: list[str] = []
        self._began = clock()
        self._size = 0

    @property
    def attempt(self) -> str:
        """The attempt that began last; empty before the first."""
        return self._attempts[-1] if self._attempts else ""

    def hear(self, beat: Beat) -> str | None:
        """Take a worker's word; the answer names who holds up its attempt, if anybody does."""
        now = self._clock()
        if beat.attempt not in self._attempts:
            self._attempts.append(beat.attempt)
            self._workers, self._began, self._size = {}, now, beat.size
        if beat.attempt != self.attempt:
            return "another attempt has begun"
        known = self._workers.get(beat.rank)
        moved = known.moved if known and known.beat.moves == beat.moves else now
        self._workers[beat.rank] = _Worker(beat, now, moved)
        return self.late()

    def late(self) -> str | None:
        """Name who holds up the attempt that began last, or None."""
        now, workers = self._clock(), self._workers.values()
        found = [
            f"{worker} has not been heard of for {now - worker.heard:.0f} s, last at {worker.beat.place}"
            for worker in workers
            if now - worker.heard > self._timeout
        ]
        if now - self._began > self._timeout:
            found += [f"worker {rank} has never reported" for rank in range(self._size) if rank not in self._workers]
        if found:
            return "; ".join(found)
        still = [worker for worker in workers if now - worker.moved > self._timeout]
        at_work = [worker for worker in still if not worker.beat.waiting]
        if at_work:
            return "; ".join(
                f"{worker} has not got on for {now - worker.moved:.0f} s, at {worker.beat.place}" for worker in at_work
            )
        if still and len(still) == self._size:
            names = ", ".join(str(worker) for worker in still)
            return f"{names} have waited for each other for {self._timeout:.0f} s, at {still[0].beat.place}"
        return None


@dataclass(frozen=True)
class Answer:
    """What a worker hears back: whether to stop after this step, and who holds up the run."""

    stop: bool
    late: str | None


class Pulse:
    """Tells of the calling thread's progress from a thread of its own, until it is closed.

    Parameters
    ----------
    tell
        Carries a beat to the watch.
    interval_s
        Seconds between two beats.
    stop
        Set if the watch asks to stop.
    end
        Called if somebody holds up the run. What waits in a collective cannot be woken, so by default the process ends
        and Ray begins a new attempt, or gives up.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        node: str,
        *,
        attempt: str,
        tell: Callable[[Beat], Answer],
        interval_s: float,
        stop: threading.Event,
        end: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self._who = {"attempt": attempt, "rank": rank, "size": size, "node": node, "pid": os.getpid()}
        self._tell, self._interval, self._stop, self._end = tell, interval_s, stop, end
        self._moves, self._place = 0, "the start"
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def moved(self, place: str) -> None:
        """Note that training has got on, and where it is."""
        self._moves, self._place = self._moves + 1, place

    def close(self) -> None:
        """Tell no more."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            waiting = waits_for_others(self._watched)
            answer = self._tell(Beat(**self._who, moves=self._moves, place=self._place, waiting=waiting))  # type: ignore[arg-type]
            if answer.stop:
                self._stop.set()
            if answer.late is not None:
                self._end()
                return


def waits_for_others(thread: int) -> bool:
    """Tell whether a thread of this process is inside a collective of torch.distributed."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(("torch.distributed", "deepspeed.comm")):
            return True
        frame = frame.f_back
    return False
