"""What each ZeRO stage costs a training step, by number of workers; one JSON line.

    python -m benchmarks.zero --preset mouse-6l --workers 1 2
    python -m benchmarks.zero --preset mouse-6l --workers 1 --device cuda

Every stage trains its own copy of one model on one prepared micro-batch, with DeepSpeed set up as users run it. The
stages take turns over several rounds, so that a change in the machine's load hits all of them; the median step counts.
Gloo carries the messages of CPU workers, which share this machine's cores (one thread each), NCCL those of GPUs.
`state_bytes` are the optimiser's states and master weights that worker 0 holds.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.training import draw_cells, masked
from train.engine import resolve_precision, start_engine
from train.model import MaskedLM
from train.presets import ModelSettings
from train.settings import BatchSettings, EngineSettings, OptimizerSettings
from train.world import World

STAGES: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "1 offloaded": {"zero_stage": 1, "offload_optimizer": True},
}


def step(engine: Any, batch: tuple[Any, ...], world: World) -> float:
    """Take one step; return its seconds."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()
    began = time.perf_counter()
    loss, _ = engine(*batch)
    engine.backward(loss / len(batch[2]), scale_wrt_gas=False)
    engine.step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()
    return time.perf_counter() - began


def state_bytes(engine: Any) -> int:
    """Bytes of the optimiser's states and of the weights that it updates, in this process."""
    groups = engine.optimizer.state.items()
    tensors = [tensor for parameter, state in groups for tensor in (parameter, *state.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def work(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    """Measure all stages in one of the workers; worker 0 writes the result."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    meet = f"file://{folder}/meet{size}"
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    world = World(rank, size, device)
    settings = ModelSettings.model_validate({"preset": options.preset})
    config = settings.bert_config(options.vocab)
    lengths = np.full(max(1, options.tokens // options.length), options.length)
    cells = draw_cells(lengths, options.vocab, settings.resolved().max_length, np.random.default_rng(rank))
    batch = tuple(part.to(device) for part in masked(cells, options.vocab))
    precision = resolve_precision("auto", device)
    engines = {}
    for name, engine in STAGES.items():
        torch.manual_seed(0)
        engines[name] = start_engine(
            MaskedLM(config).to(device),
            OptimizerSettings(),
            EngineSettings.model_validate(engine),
            BatchSettings(),
            precision,
            world,
        )
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(options.rounds + 1):
        for name, engine in engines.items():
            took = step(engine, batch, world)
            if number:  # the first round warms up
                seconds[name].append(took)
    if world.is_first:
        result = {name: {"seconds": seconds[name], "state_bytes": state_bytes(engines[name])} for name in engines}
        result["parameters"] = sum(parameter.numel() for parameter in MaskedLM(config).parameters())
        Path(folder, f"{size}.json").write_text(json.dumps(result))
    world.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mouse-6l")
    parser.add_argument("--vocab", type=int, default=25_426)
    parser.add_argument("--tokens", type=int, default=4_096, help="tokens in the micro-batch of one worker")
    parser.add_argument("--length", type=int, default=1_024, help="tokens of each cell")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    found, parameters = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for size in options.workers:
            torch.multiprocessing.spawn(work, (size, folder, options), nprocs=size)
            result = json.loads(Path(folder, f"{size}.json").read_text())
            parameters = result.pop("parameters")
            medians = {name: statistics.median(one["seconds"]) for name, one in result.items()}
            found[str(size)] = {
                name: {
                    "step_ms": round(1000 * medians[name], 1),
                    "over_stage_0": round(medians[name] / medians["0"] - 1, 3),
                    "state_mb": round(one["state_bytes"] / 1e6, 1),
                }
                for name, one in result.items()
            }
    print(
        json.dumps(
            {
                "benchmark": "zero",
                "preset": options.preset,
                "vocab": options.vocab,
                "parameters": parameters,
                "tokens_per_worker": options.tokens,
                "rounds": options.rounds,
                "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU",
                "load_average": os.getloadavg()[0],
                "versions": {name: version(name) for name in ("torch", "deepspeed")},
                "workers": found,
            }
        )
    )


if __name__ == "__main__":
    main()
