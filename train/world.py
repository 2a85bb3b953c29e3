"""The processes that train together, and the few things they say to each other."""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among those of the run; a `torch.distributed` group exists, even for one process.

    Parameters
    ----------
    node
        Name of the machine, which tells the processes that share its disk.
    group
        The `torch.distributed` group that they speak in; None is the default one.
    moved
        Called with a few words on where this process is, whenever it gets on.
    """

    rank: int
    size: int
    device: torch.device
    node: str = ""
    group: Any = None
    moved: Callable[[str], None] = lambda place: None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Add up float64 vectors over all processes; the result stays on the device."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def gather(self, value: T) -> list[T]:
        """Values of all processes, by rank. Pickled by torch: only for what this program made itself."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """The value of rank 0."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def beside(self) -> "World":
        """Open a line of their own, over the CPU, to the same processes' other threads; every process calls this.

        Nobody is hurried there: a slow store is no fault, and for a process that has gone the line breaks at once.
        """
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        return replace(self, device=torch.device("cpu"), group=group, moved=lambda place: None)

    def close(self) -> None:
        """Hang up a line that `beside` has opened."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)


class Ballot:
    """Sums of votes that every rank reads at the same step, without making the host wait for the GPU's current work.

    What a step has added up is copied to the host while the GPU goes on; the host reads it after the step.
    """

    def __init__(self) -> None:
        self._votes: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def put(self, votes: torch.Tensor) -> None:
        """Take the sums of a step, on whatever device they are."""
        if votes.device.type == "cuda":
            self._votes = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True).copy_(votes, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._votes = votes

    def read(self) -> list[float]:
        """The sums that were put last."""
        if self._votes is None:
            return []
        if self._copied is not None:
            self._copied.synchronize()
        found: list[float] = self._votes.tolist()
        return found


def single_process(device: torch.device) -> World:
    """A world of one, in this process: DeepSpeed wants a process group even then.

    The group stays until the process ends, because DeepSpeed remembers it; a second call gives the same world.

    Raises
    ------
    RuntimeError
        If the process already belongs to a larger group.
    """
    if not dist.is_initialized():
        # DeepSpeed reads these even where a group exists.
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=30))
        atexit.register(_leave)
    if dist.get_world_size() != 1:
        raise RuntimeError("this process already belongs to a process group")
    return World(0, 1, device)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
