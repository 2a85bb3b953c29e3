"""Writing checkpoints while training goes on.

The state is copied to this machine's disk between two steps; hashing, copying to the store and pruning happen in a
thread. The processes agree on the outcome over a line of their own, so that training and saving never wait for each
other's messages. Rank 0 writes the manifest when all files of all ranks are in the store, and not before.
"""

import contextlib
import hashlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from pydantic import JsonValue
from torch import Tensor

from corpus.errors import RunError, UserError
from corpus.store import Store
from train.checkpoint import BEST, ENGINE, LOG, MANIFEST, CheckpointManifest, FileRecord, folder_of, prune, remove
from train.engine import snapshot
from train.settings import KeepSettings
from train.world import World

T = TypeVar("T")


class _SaveError(Exception):
    """A checkpoint could not be written, by one rank or more; all ranks raise it together."""


@dataclass(frozen=True)
class _Draft:
    """A checkpoint before it is written: the manifest's entries, and this rank's files on its own disk."""

    entries: dict[str, Any]
    folder: Path
    problem: str

    @property
    def step(self) -> int:
        return int(self.entries["step"])


class Saver:
    """Writes the checkpoints of one run, at most one at a time; every process of the run has one.

    Parameters
    ----------
    keep
        How many checkpoints stay, and how many in a row may fail.
    emit
        Told when a checkpoint could not be written; called from the thread.
    """

    def __init__(
        self, store: Store, world: World, settings_hash: str, keep: KeepSettings, emit: Callable[[str], None]
    ) -> None:
        self._store, self._world, self._hash, self._keep, self._emit = store, world, settings_hash, keep, emit
        self._line = world.beside()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed = 0

    def save(
        self,
        engine: Any,
        *,
        position: Mapping[str, int],
        state: dict[str, JsonValue],
        log: bytes,
        best: dict[str, Tensor] | None,
    ) -> None:
        """Copy the state and begin to write it; waits for the checkpoint before. Every process calls this.

        Parameters
        ----------
        position
            `step`, `epoch`, `step_in_epoch` and `per_step` of the manifest.
        log
            The metrics log up to here, from rank 0.
        best
            Weights of the best epoch so far, if the run keeps one; must not be changed afterwards.

        Raises
        ------
        RunError
            If too many checkpoints in a row could not be written.
        """
        self.wait()
        entries = {**position, "world_size": self._world.size, "settings_hash": self._hash, "state": state}
        folder, problem = Path(tempfile.mkdtemp(prefix="checkpoint-")), ""
        try:
            snapshot(engine, folder, ENGINE)
        except OSError as error:
            problem = str(error)
        draft = _Draft(entries, folder, problem)
        # A daemon: a process whose peers are gone must be able to end.
        self._thread = threading.Thread(target=self._run, args=(draft, log, best), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written; every process calls this.

        Returns
        -------
        Whether it was written.

        Raises
        ------
        RunError
            If too many checkpoints in a row could not be written.
        """
        self._join()
        if self._error is None:
            return True
        error, self._error = self._error, None
        if not isinstance(error, _SaveError):
            raise error
        if self._failed >= self._keep.failed_checkpoints:
            raise RunError(f"{self._failed} checkpoint(s) in a row could not be written; the last one: {error}")
        return False

    def close(self) -> None:
        """Let the last checkpoint be finished, whatever becomes of it."""
        self._join()
        self._line.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, draft: _Draft, log: bytes, best: dict[str, Tensor] | None) -> None:
        try:
            self._write(draft, log, best)
            self._failed = 0
        except _SaveError as error:
            self._error = error
            self._failed += 1
            if self._world.is_first:
                with contextlib.suppress(OSError, UserError, RunError):
                    remove(self._store, draft.step)  # gives back what room it took
                self._emit(f"warning: checkpoint of step {draft.step} was not written: {error}; training goes on")
        except BaseException as error:  # noqa: BLE001 - handed over to the training thread, which raises it
            self._error = error
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)

    def _write(self, draft: _Draft, log: bytes, best: dict[str, Tensor] | None) -> None:
        first = self._world.is_first

        def begin() -> None:
            if draft.problem:
                raise OSError(draft.problem)
            if first:
                # A run that was killed here, or a checkpoint that was refused, may have left these names behind.
                remove(self._store, draft.step)
                (draft.folder / LOG).write_bytes(log)
                if best is not None:
                    safetensors.torch.save_file(best, draft.folder / BEST)

        def finish(records: list[FileRecord]) -> None:
            if first:
                files = sorted(records, key=lambda record: record.name)
                manifest = CheckpointManifest(**draft.entries, files=files)
                self._store.create(f"{folder_of(draft.step)}/{MANIFEST}", manifest.sealed().to_json())
                prune(self._store, draft.step, self._keep.checkpoints)

        self._together(begin)
        parts = self._together(lambda: self._write_files(draft))
        self._together(lambda: finish([record for part in parts for record in part]))

    def _write_files(self, draft: _Draft) -> list[FileRecord]:
        files = [path for path in sorted(draft.folder.rglob("*")) if path.is_file()]
        return [_write_file(self._store, folder_of(draft.step), path, self._world.rank) for path in files]

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Do something on every rank; what one cannot do fails for all, so that no rank waits for another."""
        mine: list[T] = []
        problem = ""
        try:
            mine.append(action())
        except (OSError, UserError, RunError) as error:
            problem = str(error) if self._world.size == 1 else f"worker {self._world.rank}: {error}"
        parts = self._line.gather((mine, problem))
        if problems := [text for _, text in parts if text]:
            raise _SaveError("; ".join(problems))
        return [value for values, _ in parts for value in values]


def _write_file(store: Store, folder: str, path: Path, rank: int) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not store.create_from_file(f"{folder}/{path.name}", path):
        raise RunError(f"{store.uri}/{folder}/{path.name}: another process has just written it: two runs, one --out?")
    return FileRecord(name=path.name, rank=rank, size_bytes=path.stat().st_size, sha256=digest)
