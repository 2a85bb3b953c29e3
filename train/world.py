"""The processes that train together, and the few things they say to each other."""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among those of the run; a `torch.distributed` group exists, even for one process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Add up float64 vectors over all processes; the result stays on the device."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Values of all processes, by rank. Pickled by torch: only for what this program made itself."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """The value of rank 0."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()


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
