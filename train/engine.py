"""A DeepSpeed engine from our settings."""

import contextlib
import io
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corpus.errors import UserError
from train.settings import BatchSettings, EngineSettings, OptimizerSettings, Precision
from train.world import World

# Parameters above which "auto" partitions more: float32 weights, gradients and two moments take 16 bytes each.
# Below the first, the whole state is under 5 GB, and partitioning it would only cost time (docs/training.md).
_AUTO_STAGES = ((300_000_000, 0), (2_000_000_000, 1), (8_000_000_000, 2))

# Set by the loop, which counts tokens and steps by them.
_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Decide what "auto" means on a device."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def resolve_stage(stage: int | str, parameters: int) -> int:
    """Decide what "auto" means for a model with so many parameters; the number of workers makes no difference."""
    if stage != "auto":
        return int(stage)
    return next((stage for limit, stage in _AUTO_STAGES if parameters < limit), 3)


def engine_config(
    engine: EngineSettings,
    batches: BatchSettings,
    clip: float,
    precision: Precision,
    world_size: int,
    *,
    parameters: int = 0,
    universal: bool = False,
) -> dict[str, Any]:
    """Generate the DeepSpeed configuration.

    Parameters
    ----------
    parameters
        Of the model, by which `zero_stage = "auto"` is decided.
    universal
        The engine will load a universal checkpoint.

    Raises
    ------
    UserError
        If the user's own JSON cannot be read or sets what the loop relies on, or if settings contradict each other.
    """
    zero: dict[str, Any] = {"stage": resolve_stage(engine.zero_stage, parameters)}
    if engine.offload_optimizer:
        # Only a partitioning optimiser can be offloaded; "auto" then takes the lowest one.
        if engine.zero_stage == 0:
            raise UserError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3 (or auto)")
        zero |= {"stage": max(zero["stage"], 1), "offload_optimizer": {"device": "cpu"}}
    config: dict[str, Any] = {
        # A micro-batch is counted in tokens, not in samples; DeepSpeed only needs consistent numbers here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": batches.accumulation,
        "train_batch_size": batches.accumulation * world_size,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Offloaded states are updated by torch's own fused AdamW: DeepSpeed's would have to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
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
    *,
    universal: bool = False,
) -> Any:
    """Wrap a model (on the world's device) in a DeepSpeed engine; every process calls this.

    Parameters
    ----------
    universal
        The engine is to load a universal checkpoint (see `to_universal`).
    """
    import deepspeed

    quieten()
    if world.device.type == "cpu":
        # An op that shares memory between ranks of one host: it would be compiled (minutes) and is never used here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = engine_config(
        engine,
        batches,
        optimizer.clip,
        precision,
        world.size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        universal=universal,
    )
    started, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(model, optimizer), config=config, dist_init_required=False
    )
    return started


def snapshot(engine: Any, folder: Path, tag: str) -> None:
    """Write this rank's part of the engine's state to `folder / tag`; every process calls this.

    Raises
    ------
    OSError
        If something could not be written: only after DeepSpeed's own barriers, so that no other rank is left waiting.
    """
    writer = engine.checkpoint_engine
    write, problems = writer.save, []

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
            problems.append(f"{path}: {error}")

    writer.save = save
    # The script that it would lay beside each checkpoint is in the installed DeepSpeed anyway.
    engine._copy_recovery_script = lambda path: None
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    finally:
        del writer.save
    if problems:
        raise OSError("; ".join(problems))


def restore(engine: Any, folder: Path, tag: str) -> None:
    """Give the engine the state of a verified checkpoint; every process calls this."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in _groups(engine)]
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise RuntimeError(f"{folder}: DeepSpeed could not load it")
    # From a universal checkpoint ZeRO-3 gives every group the options of the first one, so that biases would be
    # decayed, and one and the same counter of steps, which then counts each step as often as there are groups.
    for group, kept in zip(_groups(engine), options, strict=True):
        group.update(kept)
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _groups(engine: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = engine.optimizer.param_groups
    return found


def to_universal(source: Path, target: Path) -> None:
    """Turn the verified files of a partitioned checkpoint into DeepSpeed's universal form, which any world size loads.

    Parameters
    ----------
    source
        Folder with the files of all ranks.
    target
        Folder to write; three files per parameter.
    """
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


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
