"""Where a run's workers and its driver leave word for each other, on whatever machines they are."""

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.util
from ray.train.v2._internal.execution.callback import WorkerCallback  # no public class reaches a worker's main thread
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from train.loop import Signals
from train.watch import Answer, Beat, Pulse, Watch
from train.world import World

_ASKED = threading.Event()  # in a worker: it has received SIGTERM, or the driver has


@ray.remote(num_cpus=0)
class _Desk:
    """Lines for the user, the wish to stop, and the watch over the workers."""

    def __init__(self, timeout_s: float) -> None:
        self.lines: list[str] = []
        self.watch = Watch(timeout_s)
        self.named: tuple[str, str] | None = None
        self.stopping = False

    def put(self, line: str) -> None:
        self.lines.append(line)

    def take(self) -> list[str]:
        taken, self.lines = self.lines, []
        return taken

    def stop(self) -> None:
        self.stopping = True

    def hear(self, beat: Beat) -> Answer:
        late = self.watch.hear(beat)
        if late is not None and beat.attempt == self.watch.attempt and (self.named or ("",))[0] != beat.attempt:
            self.named = (beat.attempt, late)
            self.lines.append(f"warning: {late}: this attempt ends")
        return Answer(self.stopping, late)

    def held_up_by(self) -> str | None:
        """Who has ended the last attempt."""
        return self.named[1] if self.named is not None and self.named[0] == self.watch.attempt else None


def open_desk(timeout_s: float) -> Any:
    """Start a desk on the driver's own machine, which is the last one to go."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return _Desk.options(scheduling_strategy=here).remote(timeout_s)  # type: ignore[attr-defined]


def held_up_by(desk: Any) -> str | None:
    """The worker that the last attempt has ended for, in words, or None."""
    with contextlib.suppress(ray.exceptions.RayError):
        found: str | None = ray.get(desk.held_up_by.remote(), timeout=10)
        return found
    return None


@contextlib.contextmanager
def attended(desk: Any) -> Iterator[None]:
    """Print the workers' lines as they come, and pass a SIGTERM on to them, until the block is left."""
    leave, asked = threading.Event(), threading.Event()

    def follow() -> None:
        told = False
        while True:
            last = leave.wait(0.5)
            with contextlib.suppress(ray.exceptions.RayError):
                if asked.is_set() and not told:
                    told = True
                    print("SIGTERM: saving after this step, then ending", flush=True)
                    ray.get(desk.stop.remote())
                for line in ray.get(desk.take.remote()):
                    print(line, flush=True)
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        with _on_sigterm(asked):
            yield
    finally:
        leave.set()
        thread.join()
        ray.kill(desk)


class SaveOnSigterm(WorkerCallback):  # type: ignore[misc]
    """In each worker: a SIGTERM asks the run to save and end, a second one ends the process."""

    def after_init_train_context(self) -> None:
        """Begin to listen; Ray calls this in the main thread, the only one that may."""
        before = signal.getsignal(signal.SIGTERM)

        def hear(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, before)
            _ASKED.set()

        signal.signal(signal.SIGTERM, hear)


@contextlib.contextmanager
def reporting(desk: Any, world: World, timeout_s: float) -> Iterator[tuple[World, Signals]]:
    """Tell the desk of this worker's progress while the block runs.

    Yields
    ------
    The world, which now tells of its moves, and what reaches the worker from outside.
    """
    tick = min(1.0, timeout_s / 10)

    def tell(beat: Beat) -> Answer:
        try:
            answer: Answer = ray.get(desk.hear.remote(beat), timeout=10 * tick)
        except ray.exceptions.RayError:  # the driver is gone or too busy; Ray ends its workers by itself
            return Answer(stop=False, late=None)
        return answer

    attempt = world.from_first(uuid.uuid4().hex)
    pulse = Pulse(
        world.rank, world.size, world.node, attempt=attempt, tell=tell, interval_s=tick, stop=_ASKED, end=_end
    )
    try:
        yield replace(world, moved=pulse.moved), Signals(stop=_ASKED, preempted=_preemption)
    finally:
        pulse.close()


def node_name() -> str:
    """Name this machine for people, and apart from all others."""
    return f"{ray.util.get_node_ip_address()}/{ray.get_runtime_context().get_node_id()[:8]}"


def _end() -> None:
    os._exit(1)


def _preemption() -> str | None:
    """What Ray knows of machines that are about to be taken away; every worker has to ask equally often."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    ranks = ", ".join(map(str, info.preempted_ranks))
    return f"the machine of worker {ranks} is about to be taken away"


@contextlib.contextmanager
def _on_sigterm(asked: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # in a trial of Ray Tune, which has its own ways
        return
    before = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        asked.set()

    signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
