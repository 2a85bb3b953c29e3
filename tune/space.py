"""The search space, and how a point of it becomes fine-tuning settings."""

import json
from collections.abc import Mapping
from typing import Any

import ray.tune

from train.settings import FinetuneOptions
from tune.settings import SpaceSettings


def param_space(space: SpaceSettings) -> dict[str, Any]:
    """Translate for Ray Tune; keys are paths into `FinetuneOptions`."""

    def log_range(low: float, high: float) -> Any:
        return low if low == high else ray.tune.loguniform(low, high)

    warmup = space.warmup[0] if space.warmup[0] == space.warmup[1] else ray.tune.uniform(*space.warmup)
    return {
        "optimizer.learning_rate": log_range(*space.learning_rate),
        "optimizer.schedule": ray.tune.choice(list(space.schedule)),
        "optimizer.warmup": warmup,
        "optimizer.weight_decay": log_range(*space.weight_decay),
        "freeze_layers": ray.tune.choice(list(space.freeze_layers)),
    }


def apply_point(options: FinetuneOptions, point: Mapping[str, Any]) -> FinetuneOptions:
    """Lay a point of the space over shared settings, its numbers rounded so that people can copy them."""
    values = options.model_dump()
    for path, value in rounded(point).items():
        *groups, name = path.split(".")
        target = values
        for group in groups:
            target = target[group]
        target[name] = value
    return FinetuneOptions.model_validate(values)


def rounded(point: Mapping[str, Any]) -> dict[str, Any]:
    """Round the numbers of a point to three digits."""
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in point.items()}


def to_toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Write settings as TOML, plain values before tables. TOML knows no None: such settings are left out."""
    groups = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in values.items() if key not in groups and value is not None}
    # JSON's strings, numbers, booleans and lists of them are TOML's.
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for key, value in groups.items():
        body = to_toml(value, f"{prefix}{key}.")
        if body:
            lines += ["", f"[{prefix}{key}]", body.rstrip("\n")]
    return "\n".join(lines).lstrip("\n") + "\n" if lines else ""
