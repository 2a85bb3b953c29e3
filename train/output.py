"""The output folder of a run: whose it is, and how a finished one comes about.

`run.json` says whose it is, checkpoints say how far it came, and metrics.json, written last, that it is done.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corpus.errors import UserError
from corpus.store import Store
from train import checkpoint
from train.settings import settings_hash

RUN = "run.json"
METRICS = "metrics.json"
_LAST = ("card.json", METRICS)


def claim(
    store: Store, identity: dict[str, Any], *, done: str = METRICS, traces: str = checkpoint.FOLDER
) -> dict[str, Any] | None:
    """Take an output folder for a run.

    Parameters
    ----------
    identity
        Settings and inputs that the result depends on.
    done
        The file that a finished run has.
    traces
        The folder that an unfinished run leaves behind.

    Returns
    -------
    The content of `done` if this very run is finished already, else None.

    Raises
    ------
    UserError
        If the folder belongs to a run with other settings or inputs; the message names them.
    """
    text = json.dumps({"hash": settings_hash(identity), **identity}, indent=1, sort_keys=True).encode() + b"\n"
    if store.exists(RUN):
        found = json.loads(store.read_bytes(RUN))
        if found.get("hash") != settings_hash(identity):
            if store.exists(done) or store.names(traces):
                raise UserError(
                    f"{store.uri}: belongs to a run that differs in {_differences(found, identity)}; "
                    "give those settings, or another --out"
                )
            store.remove(RUN)
    elif store.exists(done) or store.exists("card.json"):
        raise UserError(f"{store.uri}: holds results of something else (no {RUN}); choose another --out")
    store.create(RUN, text)
    return finished(store, done)


def finished(store: Store, done: str = METRICS) -> dict[str, Any] | None:
    """Metrics of a finished run, or None."""
    if not store.exists(done):
        return None
    found: dict[str, Any] = json.loads(store.read_bytes(done))
    return found


def publish(store: Store, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Copy a model folder to its place; card.json and metrics.json come last.

    What a killed export left behind is removed first, in the opposite order, so that at no moment the folder looks
    more finished than it is.
    """
    (folder / METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: _LAST.index(name) if name in _LAST else -1)
    for name in reversed(names):
        if store.exists(name):
            store.remove(name)
    for name in names:
        store.create_from_file(name, folder / name)
    shutil.rmtree(folder)


def _differences(found: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    ours, theirs = _flat(identity), _flat({key: value for key, value in found.items() if key != "hash"})
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    shown = [
        f"{key} ({theirs.get(key, 'absent')} there, {ours.get(key, 'absent')} now)"
        if len(str(ours.get(key))) < 40
        else key
        for key in keys[:5]
    ]
    return ", ".join(shown) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}".removeprefix("settings.")
        out |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return out
