"""The processes that train together, and the few things they say to each other."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
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


@contextmanager
def single_process(device: torch.device) -> Iterator[World]:
    """A world of one, in this process: DeepSpeed wants a process group even then."""
    if dist.is_initialized():
        raise RuntimeError("this process already belongs to a process group")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{Path(folder) / 'group'}",
            rank=0,
            world_size=1,
            timeout=timedelta(minutes=30),
        )
        kept = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        try:
            yield World(0, 1, device)
        finally:
            dist.destroy_process_group()
            for name, value in kept.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value
