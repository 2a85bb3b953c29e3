"""Who holds up a run (R14): the watch on a clock of its own, and a pulse around a real thread."""

import threading
import time
from dataclasses import replace

import pytest

from train.watch import Answer, Beat, Pulse, Watch, waits_for_others


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def beat(rank: int, moves: int = 0, **changes) -> Beat:
    made = Beat("first", rank, 2, f"host{rank}", 1000 + rank, moves, f"step {moves}", waiting=False)
    return replace(made, **changes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock) -> Watch:
    return Watch(10, clock)


def test_workers_that_get_on_are_left_alone(watch, clock):
    for second in range(60):
        clock.now += 1
        assert watch.hear(beat(0, second)) is None
        assert watch.hear(beat(1, second // 5)) is None


def test_a_silent_worker_is_named(watch, clock):
    watch.hear(beat(1, 7))
    for _ in range(10):
        clock.now += 1
        assert watch.hear(beat(0, 8, waiting=True)) is None
    clock.now += 1
    late = watch.hear(beat(0, 8, waiting=True))
    assert late == "worker 1 (node host1, process 1001) has not been heard of for 11 s, last at step 7"


def test_a_worker_that_never_came_is_named(watch, clock):
    watch.hear(beat(0))
    clock.now += 11
    assert watch.hear(beat(0, 1)) == "worker 1 has never reported"


def test_of_two_that_stand_still_the_one_that_does_not_wait_is_named(watch, clock):
    for _ in range(12):
        clock.now += 1
        watch.hear(beat(0, 8, waiting=True))
        late = watch.hear(beat(1, 7))
    assert late == "worker 1 (node host1, process 1001) has not got on for 11 s, at step 7"


def test_workers_that_wait_for_each_other_are_all_named(watch, clock):
    for _ in range(12):
        clock.now += 1
        watch.hear(beat(0, 8, waiting=True))
        late = watch.hear(beat(1, 8, waiting=True))
    assert "worker 0" in late
    assert "worker 1" in late
    assert "waited for each other" in late


def test_one_waiting_worker_alone_is_no_fault(watch, clock):
    # Rank 0 writes the model; the other waits at the barrier for as long as rank 0 gets on.
    for second in range(40):
        clock.now += 1
        assert watch.hear(beat(0, second)) is None
        assert watch.hear(beat(1, 8, waiting=True)) is None


def test_a_new_attempt_begins_afresh_and_the_old_one_is_told_to_end(watch, clock):
    watch.hear(beat(0))
    watch.hear(beat(1))
    clock.now += 11
    assert watch.hear(beat(0, attempt="second")) is None
    assert watch.hear(beat(1)) == "another attempt has begun"
    assert watch.late() is None


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_pulse_tells_of_progress_and_passes_on_the_answers():
    told: list[Beat] = []
    answers = [Answer(False, None)]
    stop, ended = threading.Event(), threading.Event()

    def tell(beat: Beat) -> Answer:
        told.append(beat)
        return answers[0]

    pulse = Pulse(1, 2, "host", attempt="a", tell=tell, interval_s=0.01, stop=stop, end=ended.set)
    wait_until(lambda: told)
    pulse.moved("step 5")
    wait_until(lambda: told[-1].place == "step 5")
    assert (told[-1].rank, told[-1].moves, told[-1].waiting) == (1, 1, False)
    assert not stop.is_set()
    answers[0] = Answer(True, None)
    wait_until(stop.is_set)
    assert not ended.is_set()
    answers[0] = Answer(False, "worker 0 has never reported")
    wait_until(ended.is_set)
    pulse.close()


def test_a_thread_inside_a_collective_waits_for_others():
    leave = threading.Event()
    # As if the loop had called into torch.distributed: what counts is the module that the frames belong to.
    scope = {"__name__": "torch.distributed.distributed_c10d", "leave": leave}
    exec("def all_reduce():\n    leave.wait()", scope)
    inside, outside = (threading.Thread(target=target) for target in (scope["all_reduce"], leave.wait))
    for thread in (inside, outside):
        thread.start()
    try:
        assert waits_for_others(inside.ident)
        assert not waits_for_others(outside.ident)
    finally:
        leave.set()
        inside.join()
        outside.join()
