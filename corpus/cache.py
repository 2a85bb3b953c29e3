"""Copies of a remote corpus's shards on a local disk, shared by all processes of a machine.

A copy is named by the SHA-256 of its content and gets its name only when that hash was found in it, so that whoever
sees a copy may read it. A folder that several corpora use stays below its bound by dropping what was read longest ago.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from corpus.errors import RunError
from corpus.manifest import Unit
from corpus.store import Store

_CHUNK_BYTES = 8 << 20
_ATTEMPTS = 3


@dataclass(frozen=True)
class ShardCache:
    """A bounded folder of shard copies.

    Parameters
    ----------
    folder
        Created if absent.
    max_bytes
        Of all copies together; a copy in the making comes on top.
    """

    folder: Path
    max_bytes: int

    def choose(self, units: Sequence[Unit]) -> frozenset[str]:
        """SHA-256 of the shards of a corpus that are to be copied: as many of the first ones as fit.

        A shuffled epoch returns to every shard over and over. Were all of a corpus that does not fit to pass through
        the folder, whole shards would be copied for a row group and dropped before the next one was wanted.
        """
        chosen, total = set(), 0
        for unit in units:
            total += unit.size_bytes
            if total > self.max_bytes:
                break
            chosen.add(unit.sha256)
        return frozenset(chosen)

    def open(self, store: Store, unit: Unit) -> pa.OSFile:
        """Open the copy of a shard, made now if there is none.

        Raises
        ------
        UserError, RunError
            If the shard cannot be read, or is not what the manifest says: the message names it.
        """
        path = self.folder / f"{unit.sha256}.parquet"
        for _ in range(_ATTEMPTS):
            try:
                now = time.time_ns()  # the kernel's own stamp is some milliseconds coarse
                os.utime(path, ns=(now, now))
                return pa.OSFile(str(path))
            except FileNotFoundError:  # not there yet, or dropped by another process between the two lines
                self._fetch(store, unit, path)
        raise RunError(f"{self.folder}: other programs drop shards faster than they are read; give the cache more room")

    def _fetch(self, store: Store, unit: Unit, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(unit.sha256):  # one process copies, the others of the machine wait for it
            if path.exists():
                return
            with self._locked("room"):
                self._make_room(unit.size_bytes)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", suffix=".part", delete=False) as part:
                try:
                    digest, size = hashlib.sha256(), 0
                    with store.open(unit.shard) as source:
                        while chunk := source.read(_CHUNK_BYTES):
                            part.write(chunk)
                            digest.update(chunk)
                            size += len(chunk)
                    if digest.hexdigest() != unit.sha256:
                        raise RunError(
                            f"{store.uri}/{unit.shard}: damaged or changed: {size:,} bytes with SHA-256 "
                            f"{digest.hexdigest()[:16]}, the manifest has {unit.size_bytes:,} with {unit.sha256[:16]}"
                        )
                    part.flush()
                    Path(part.name).rename(path)
                except BaseException:
                    Path(part.name).unlink()
                    raise

    def _make_room(self, wanted: int) -> None:
        """Drop what was read longest ago; a process that has a dropped copy open goes on reading it."""
        copies = []
        for copy in self.folder.glob("*.parquet"):
            try:
                facts = copy.stat()
            except FileNotFoundError:
                continue
            copies.append((facts.st_mtime_ns, facts.st_size, copy))
        total = sum(size for _, size, _ in copies) + wanted
        for _, size, copy in sorted(copies):
            if total <= self.max_bytes:
                return
            copy.unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, also by a killed process
            yield
