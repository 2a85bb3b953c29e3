"""What made an output: resolved settings, versions, git commit, hashes of the inputs."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from corpus.hashing import digest_json
from corpus.store import Store

_PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "deepspeed",
    "pyarrow",
    "polars",
    "anndata",
    "numpy",
    "numba",
    "scikit-learn",
)


def describe(command: str, settings: BaseModel, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Describe a run.

    Parameters
    ----------
    command
        For example `"train pretrain"`.
    settings
        The resolved settings.
    inputs
        Name of an input to its content hash.
    """
    return {
        "command": command,
        "arguments": sys.argv[1:],
        "settings": settings.model_dump(mode="json"),
        "inputs": dict(inputs),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record_run(store: Store, command: str, settings: BaseModel, inputs: Mapping[str, str]) -> str:
    """Write the description as `runs/<time>-<hash>.json` beside an output; return the name."""
    facts = describe(command, settings, inputs)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    name = f"runs/{stamp}-{digest_json(facts, 8)}.json"
    store.create(name, json.dumps(facts, indent=1, sort_keys=True).encode() + b"\n")
    return name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    # A checkout sent to a cluster by `ray job submit` carries no .git; then the commit is unknown, and said so (null).
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
