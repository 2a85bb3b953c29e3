"""Checkpoints that are either whole and verified, or not used: `checkpoints/step-00000123/{files, MANIFEST.json}`.

What a checkpoint is, and how the newest good one is found and opened; train/saver.py writes them. DeepSpeed's files are
pickles: nothing here hands one on before its bytes have been found to have the hash in the manifest, and only the
private copy whose bytes were hashed.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from pydantic import JsonValue, ValidationError
from torch import Tensor

from corpus.errors import RunError
from corpus.manifest import Record
from corpus.store import Store
from train.engine import to_universal
from train.world import World

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
LOG = "metrics.jsonl"
BEST = "best.safetensors"
ENGINE = "engine"  # DeepSpeed's name for the set of its files
_UNIVERSAL = "universal"
_PARTITION = "_optim_states.pt"  # how the files end that DeepSpeed writes for one rank's part of the optimiser states
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
    per_step
        Micro-batches of a step over all workers, which fixes the cells of every step.
    world_size
        Workers that wrote it.
    settings_hash
        Run that it belongs to.
    state
        Whatever else the loop has to remember.
    seal
        SHA-256 of all the rest.
    """

    format_version: int = 1
    step: int
    epoch: int
    step_in_epoch: int
    per_step: int
    world_size: int
    settings_hash: str
    state: dict[str, JsonValue]
    files: list[FileRecord]
    seal: str = ""

    def sealed(self) -> "CheckpointManifest":
        """The same with its seal."""
        return self.model_copy(update={"seal": self._digest()})

    @property
    def is_sound(self) -> bool:
        """Whether nothing has changed since it was sealed."""
        return self.seal == self._digest()

    def _digest(self) -> str:
        return hashlib.sha256(self.model_copy(update={"seal": ""}).to_json()).hexdigest()

    @property
    def folder(self) -> str:
        """Where the checkpoint lies in the output folder."""
        return folder_of(self.step)


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files have been verified, in a private folder of this machine.

    Parameters
    ----------
    folder, tag
        What DeepSpeed's `load_checkpoint` takes.
    universal
        It was written by another number of workers and has been converted: the engine must be made for that.
    log, best
        The metrics log up to there, and the best weights if the run keeps some.
    """

    manifest: CheckpointManifest
    folder: Path
    tag: str
    universal: bool
    log: bytes
    best: dict[str, Tensor] | None


@contextmanager
def open_newest(store: Store, world: World, settings_hash: str) -> Iterator[tuple[Found | None, list[str]]]:
    """Find the newest good checkpoint and copy it here; every process enters this.

    A process copies its own files and those of rank 0. If another number of workers wrote the checkpoint, one process
    of each machine copies all files and converts them for the others.

    Yields
    ------
    found
        None if there is no usable checkpoint. The copy is gone when the block is left.
    skipped
        One line for each newer checkpoint that was not used: its name and why.

    Raises
    ------
    RunError
        If a good checkpoint cannot be copied or converted for lack of space or the like.
    """
    skipped: list[str] = []
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        for step in world.from_first(list(reversed(steps(store)))):
            manifest = world.from_first(_read_manifest(store, step, settings_hash) if world.is_first else "")
            if isinstance(manifest, str):
                skipped += [manifest] if manifest else []
                continue
            found = _open(store, manifest, world, Path(temporary) / f"{step}")
            if isinstance(found, list):
                skipped += found
                continue
            yield found, skipped
            world.barrier()  # the processes of a machine may share a copy
            return
        yield None, skipped


def steps(store: Store) -> list[int]:
    """Steps of the checkpoints in an output folder, whole or not, ascending."""
    names = [name.removeprefix("step-") for name in store.names(FOLDER) if name.startswith("step-")]
    return sorted(int(name) for name in names if name.isdigit())


def folder_of(step: int) -> str:
    """Where the checkpoint of a step lies in the output folder."""
    return f"{FOLDER}/step-{step:08d}"


def remove(store: Store, step: int) -> None:
    """Remove a checkpoint, its manifest first: what is left is never taken for a whole one."""
    folder = folder_of(step)
    names = store.names(folder)
    for name in sorted(names, key=lambda name: name != MANIFEST):
        store.remove(f"{folder}/{name}")
    local = store.local_path(folder)
    if local is not None and local.is_dir():
        shutil.rmtree(local)  # hidden temporary files of a killed writer


def prune(store: Store, newest: int, keep: int) -> None:
    """Keep so many whole checkpoints up to `newest`; what was left unfinished before it goes as well."""
    whole = [step for step in steps(store) if step <= newest and store.exists(f"{folder_of(step)}/{MANIFEST}")]
    for step in steps(store):
        if step < newest and step not in whole[-keep:]:
            remove(store, step)


def _read_manifest(store: Store, step: int, settings_hash: str) -> CheckpointManifest | str:
    """Read and judge a manifest; a text says why its checkpoint cannot be used (empty: there is nothing at all)."""
    folder = folder_of(step)
    name = f"{store.uri}/{folder}"
    if not store.names(folder):
        return ""  # some object stores remember the folders of removed files
    if not store.exists(f"{folder}/{MANIFEST}"):
        return f"{name}: skipped, it was not finished (no {MANIFEST})"
    data = store.read_bytes(f"{folder}/{MANIFEST}")
    try:
        manifest = CheckpointManifest.model_validate_json(data)
    except ValidationError as error:
        return f"{name}/{MANIFEST}: skipped, damaged: {error.errors()[0]['msg']}"
    if not manifest.is_sound or manifest.to_json() != data:
        return f"{name}/{MANIFEST}: skipped, damaged: its seal does not fit"
    if manifest.step != step:
        return f"{name}/{MANIFEST}: skipped, it is the manifest of step {manifest.step}"
    if manifest.settings_hash != settings_hash:
        return f"{name}: skipped, it belongs to a run with other settings ({manifest.settings_hash})"
    if not all(_PLAIN_NAME.fullmatch(record.name) for record in manifest.files):
        return f"{name}/{MANIFEST}: skipped, a file name in it is not a plain name"
    return manifest


def _open(store: Store, manifest: CheckpointManifest, world: World, place: Path) -> Found | list[str]:
    """Copy and verify a checkpoint; a list says what is wrong with it."""
    partitioned = any(record.name.endswith(_PARTITION) for record in manifest.files)
    universal = partitioned and manifest.world_size != world.size
    nodes = world.gather((world.node, str(place)))
    helper = [node for node, _ in nodes].index(world.node)  # the first process of this machine
    wanted = set(range(manifest.world_size)) if universal and world.rank == helper else {0}
    if not universal:
        wanted.add(world.rank)
    records = [record for record in manifest.files if record.rank in wanted]
    bad, stuck = [], ""
    try:
        (place / ENGINE).mkdir(parents=True)
        for record in records:
            target = place / record.name if record.name in (LOG, BEST) else place / ENGINE / record.name
            problem = _fetch(store, f"{manifest.folder}/{record.name}", target, record)
            if problem:
                bad.append(f"{store.uri}/{manifest.folder}: skipped, {record.name} {problem}")
    except OSError as error:
        stuck = str(error)
    if problems := _of_all(world, bad):
        shutil.rmtree(place)
        return problems
    if universal and world.rank == helper and not stuck:
        try:
            to_universal(place / ENGINE, place / _UNIVERSAL)
        except OSError as error:
            stuck = str(error)
    if failures := _of_all(world, [stuck] if stuck else []):
        raise RunError(f"{store.uri}/{manifest.folder}: is whole, but cannot be opened here: {failures[0]}")
    best = place / BEST
    return Found(
        manifest,
        Path(nodes[helper][1]) if universal else place,
        _UNIVERSAL if universal else ENGINE,
        universal,
        (place / LOG).read_bytes(),
        safetensors.torch.load_file(best) if best.exists() else None,
    )


def _of_all(world: World, texts: list[str]) -> list[str]:
    return sorted({text for part in world.gather(texts) for text in part})


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
