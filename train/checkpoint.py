"""Checkpoints that are either whole and verified, or not used: `checkpoints/step-00000123/{files, MANIFEST.json}`.

Every rank writes its DeepSpeed files to its own disk, hashes them and copies them to the store; rank 0 writes the
manifest last. DeepSpeed's files are pickles: nothing here opens one before its bytes have been found to have the hash
in the manifest, and only from the private copy whose bytes were hashed.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import JsonValue, ValidationError
from torch import Tensor

from corpus.errors import UserError
from corpus.manifest import Record
from corpus.store import Store
from train.world import World

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
LOG = "metrics.jsonl"
BEST = "best.safetensors"
_TAG = "engine"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class FileRecord(Record):
    """One file of a checkpoint."""

    name: str
    rank: int
    size_bytes: int
    sha256: str


class CheckpointManifest(Record):
    """What a checkpoint holds and where training stood.

    Parameters
    ----------
    step
        Steps taken since the beginning.
    epoch, step_in_epoch
        Position in the data: the step to take next.
    world_size
        Workers that wrote it.
    settings_hash
        Run that it belongs to.
    state
        Whatever else the loop has to remember.
    """

    format_version: int = 1
    step: int
    epoch: int
    step_in_epoch: int
    world_size: int
    settings_hash: str
    state: dict[str, JsonValue]
    files: list[FileRecord]

    @property
    def folder(self) -> str:
        """Where the checkpoint lies in the output folder."""
        return _folder(self.step)


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back, besides the engine's own state."""

    manifest: CheckpointManifest
    log: bytes
    best: dict[str, Tensor] | None


def save_checkpoint(
    store: Store,
    engine: Any,
    world: World,
    *,
    position: Mapping[str, int],
    settings_hash: str,
    state: dict[str, JsonValue],
    log: bytes,
    best: dict[str, Tensor] | None,
    keep: int,
) -> None:
    """Write a checkpoint and remove the oldest ones; every process calls this.

    Parameters
    ----------
    position
        `step`, `epoch` and `step_in_epoch` of the manifest.
    log
        The metrics log up to here, from rank 0.
    best
        Weights of the best epoch so far, if the run keeps one.
    keep
        Checkpoints that stay.
    """
    folder = _folder(position["step"])
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        local = Path(temporary)
        engine.save_checkpoint(str(local), tag=_TAG, save_latest=False)
        files = {path.name: path for path in sorted((local / _TAG).glob("*")) if path.is_file()}
        if world.is_first:
            # A run that was killed here, or a checkpoint that was refused, may have left these names behind.
            _remove(store, folder)
            files[LOG] = local / LOG
            files[LOG].write_bytes(log)
            if best is not None:
                files[BEST] = local / BEST
                safetensors.torch.save_file(best, files[BEST])
        world.barrier()
        records = [_write_file(store, folder, name, path, world.rank) for name, path in files.items()]
    gathered = [record for part in world.gather(records) for record in part]
    if world.is_first:
        manifest = CheckpointManifest(
            **position,
            world_size=world.size,
            settings_hash=settings_hash,
            state=state,
            files=sorted(gathered, key=lambda record: record.name),
        )
        store.create(f"{folder}/{MANIFEST}", manifest.to_json())
        for old in steps(store)[:-keep]:
            _remove(store, _folder(old))
    world.barrier()


def load_newest(store: Store, engine: Any, world: World, settings_hash: str) -> tuple[Restored | None, list[str]]:
    """Put the engine where the newest good checkpoint left it; every process calls this.

    Returns
    -------
    restored
        None if there is no usable checkpoint.
    skipped
        One line for each newer checkpoint that was not used: its name and why.

    Raises
    ------
    UserError
        If the checkpoint was written by another number of workers.
    """
    skipped: list[str] = []
    for step in world.from_first(list(reversed(steps(store)))):
        manifest = world.from_first(_read_manifest(store, step, settings_hash) if world.is_first else "")
        if isinstance(manifest, str):
            skipped += [manifest] if manifest else []
            continue
        if manifest.world_size != world.size:
            raise UserError(
                f"{store.uri}/{manifest.folder}: written by {manifest.world_size} worker(s), this run has "
                f"{world.size}; go on with --workers.count {manifest.world_size}, or begin anew in another --out"
            )
        with _verified_copy(store, manifest, world) as (folder, problems):
            if problems:
                skipped.extend(problems)
                continue
            # The hashes are verified: only now may DeepSpeed unpickle.
            path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
            if path is None:
                raise UserError(f"{store.uri}/{manifest.folder}: DeepSpeed could not load it")
            best = folder / BEST
            restored = Restored(
                manifest,
                (folder / LOG).read_bytes(),
                safetensors.torch.load_file(best) if best.exists() else None,
            )
        return restored, skipped
    return None, skipped


def steps(store: Store) -> list[int]:
    """Steps of the checkpoints in an output folder, whole or not, ascending."""
    names = [name.removeprefix("step-") for name in store.names(FOLDER) if name.startswith("step-")]
    return sorted(int(name) for name in names if name.isdigit())


def _folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def _write_file(store: Store, folder: str, name: str, path: Path, rank: int) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not store.create_from_file(f"{folder}/{name}", path):
        raise RuntimeError(f"{store.uri}/{folder}/{name}: another process has just written it: two runs, one --out?")
    return FileRecord(name=name, rank=rank, size_bytes=path.stat().st_size, sha256=digest)


def _remove(store: Store, folder: str) -> None:
    """Remove a checkpoint, its manifest first: what is left is never taken for a whole one."""
    names = store.names(folder)
    for name in sorted(names, key=lambda name: name != MANIFEST):
        store.remove(f"{folder}/{name}")
    local = store.local_path(folder)
    if local is not None and local.is_dir():
        shutil.rmtree(local)  # hidden temporary files of a killed writer


def _read_manifest(store: Store, step: int, settings_hash: str) -> CheckpointManifest | str:
    """Read and judge a manifest; a text says why its checkpoint cannot be used (empty: there is nothing at all)."""
    name = f"{store.uri}/{_folder(step)}"
    if not store.names(_folder(step)):
        return ""  # some object stores remember the folders of removed files
    if not store.exists(f"{_folder(step)}/{MANIFEST}"):
        return f"{name}: skipped, it was not finished (no {MANIFEST})"
    try:
        manifest = CheckpointManifest.model_validate_json(store.read_bytes(f"{_folder(step)}/{MANIFEST}"))
    except ValidationError as error:
        return f"{name}/{MANIFEST}: skipped, damaged: {error.errors()[0]['msg']}"
    if manifest.step != step:
        return f"{name}/{MANIFEST}: skipped, it is the manifest of step {manifest.step}"
    if manifest.settings_hash != settings_hash:
        return f"{name}: skipped, it belongs to a run with other settings ({manifest.settings_hash})"
    if not all(_PLAIN_NAME.fullmatch(record.name) for record in manifest.files):
        return f"{name}/{MANIFEST}: skipped, a file name in it is not a plain name"
    return manifest


@contextmanager
def _verified_copy(store: Store, manifest: CheckpointManifest, world: World) -> Iterator[tuple[Path, list[str]]]:
    """Copy what this rank needs (its own files and those of rank 0) to a private folder, hashing what was copied.

    Yields
    ------
    The folder, and the problems that any rank has found.
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        folder, problems = Path(temporary), []
        (folder / _TAG).mkdir()
        for record in manifest.files:
            if record.rank not in (0, world.rank):
                continue
            place = folder if record.name in (LOG, BEST) else folder / _TAG
            problem = _fetch(store, f"{manifest.folder}/{record.name}", place / record.name, record)
            if problem:
                problems.append(f"{store.uri}/{manifest.folder}: skipped, {record.name} {problem}")
        found = [line for part in world.gather(problems) for line in part]
        yield folder, sorted(set(found))


def _fetch(store: Store, name: str, target: Path, record: FileRecord) -> str | None:
    if not store.exists(name):
        return "is missing"
    with store.open(name) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    if (size := target.stat().st_size) != record.size_bytes:
        return f"has {size} bytes instead of {record.size_bytes}"
    with target.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != record.sha256:
            return "is damaged: its SHA-256 is not the one in the manifest"
    return None
