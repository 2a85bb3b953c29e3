"""A DeepSpeed engine from our settings."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corpus.errors import UserError
from train.settings import BatchSettings, EngineSettings, OptimizerSettings, Precision
from train.world import World

# Set by the loop, which counts tokens and steps by them.
_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Decide what "auto" means on a device."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def engine_config(
    engine: EngineSettings, batches: BatchSettings, clip: float, precision: Precision, world_size: int
) -> dict[str, Any]:
    """Generate the DeepSpeed configuration.

    Raises
    ------
    UserError
        If the user's own JSON cannot be read or sets what the loop relies on.
    """
    config: dict[str, Any] = {
        # A micro-batch is counted in tokens, not in samples; DeepSpeed only needs consistent numbers here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": batches.accumulation,
        "train_batch_size": batches.accumulation * world_size,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        # Weights and optimiser states stay in float32; matrix products run in bf16.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "wall_clock_breakdown": False,
        "steps_per_print": 2**31 - 1,
    }
    if engine.deepspeed_json is not None:
        config = _overlay(config, _read_json(engine.deepspeed_json))
    return config


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; biases and layer norms are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=trainable[0].device.type == "cuda",
    )


def start_engine(
    model: nn.Module,
    optimizer: OptimizerSettings,
    engine: EngineSettings,
    batches: BatchSettings,
    precision: Precision,
    world: World,
) -> Any:
    """Wrap a model (on the world's device) in a DeepSpeed engine; every process calls this."""
    import deepspeed

    quieten()
    if world.device.type == "cpu":
        # An op that shares memory between ranks of one host: it would be compiled (minutes) and is never used here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    started, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, optimizer),
        config=engine_config(engine, batches, optimizer.clip, precision, world.size),
        dist_init_required=False,
    )
    return started


def quieten() -> None:
    """Keep DeepSpeed's hundreds of informational lines out of the user's terminal."""
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy all weights to host memory, float32, gathering what ZeRO-3 has partitioned; every process calls this."""
    from deepspeed.runtime.zero import GatheredParameters

    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            state[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return state


@contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """Run a plain model in the precision of the engine."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


def _read_json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"engine.deepspeed_json: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"engine.deepspeed_json: {path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"engine.deepspeed_json: {path}: expected an object")
    for key in _OURS:
        if key in found:
            raise UserError(f"engine.deepspeed_json: {path}: {key!r} follows from our own settings; leave it out")
    return found


def _overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged
