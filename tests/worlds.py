"""Several training processes without Ray: a gloo group of fresh processes that run one function."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from train.world import World


def run_world(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(world, *arguments)` in `size` processes; an exception in one of them is raised here.

    The function must be at the top level of a module of `tests`, for the new processes import it by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enter, (size, str(Path(folder) / "meet"), function, arguments), nprocs=size)


def _enter(rank: int, size: int, meet: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    function(World(rank, size, torch.device("cpu")), *arguments)
    dist.destroy_process_group()
