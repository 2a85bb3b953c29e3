"""One door to local folders and object storage: read, list, and create-if-absent.

Nothing here overwrites or renames: a name is either absent or holds what its first writer put there. That single
property carries the commit protocol of a corpus (docs/corpus-format.md).
"""

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from corpus.errors import RunError, UserError
from corpus.hashing import digest_stream
from corpus.remote_file import RemoteFile
from corpus.store_errors import error_codes, is_passing, is_taken, told

# Objects of two parts and more are sent in parts; S3 takes no part but the last below 5 MiB.
_PART_BYTES = 64 << 20
_ATTEMPTS = 6


class Store:
    """A folder, local or `s3://bucket/prefix`, addressed by relative POSIX paths.

    Credentials and endpoint of S3 come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...).
    Instances hold no connection when pickled, so they travel to Ray workers as they are.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri).rstrip("/") or "/"
        self.is_local = "://" not in self.uri or self.uri.startswith("file://")
        if self.is_local:
            self.uri = str(Path(self.uri.removeprefix("file://")).expanduser().absolute())

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "is_local": self.is_local}

    def __truediv__(self, path: str) -> "Store":
        return Store(f"{self.uri}/{path}")

    @cached_property
    def _fs_root(self) -> tuple[AbstractFileSystem, str]:
        # A listings cache would hide objects that other workers have just created.
        options = {} if self.is_local else {"use_listings_cache": False}
        try:
            fs, root = url_to_fs(self.uri, **options)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.uri}: cannot open this kind of location: {error}") from error
        return fs, root

    def _full(self, path: str) -> str:
        root = self._fs_root[1]
        return f"{root}/{path}" if path else root

    def local_path(self, path: str = "") -> Path | None:
        """Path on this machine's disk, or None for object storage."""
        return Path(self.uri) / path if self.is_local else None

    def exists(self, path: str = "") -> bool:
        """Tell whether a file (or a folder with something in it) has this name."""
        with told(f"{self.uri}/{path}"):
            return bool(self._fs_root[0].exists(self._full(path)))

    def size(self, path: str) -> int:
        """Size of a file in bytes."""
        with told(f"{self.uri}/{path}"):
            return int(self._fs_root[0].size(self._full(path)))

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders directly inside `folder`, sorted; empty if there is no such folder."""
        fs, _ = self._fs_root
        with told(f"{self.uri}/{folder}"):
            try:
                found = fs.ls(self._full(folder), detail=False)
            except FileNotFoundError as error:
                if "NoSuchBucket" in error_codes(error):
                    raise
                return []
        # `.` names are writers' temporary files that a killed process left behind.
        names = {PurePosixPath(name).name for name in found}
        return sorted(name for name in names if not name.startswith("."))

    def modified(self, path: str) -> float:
        """Time of last change, in seconds since 1970."""
        with told(f"{self.uri}/{path}"):
            return float(self._fs_root[0].modified(self._full(path)).timestamp())

    def version(self, path: str) -> str:
        """What changes when a file is written anew: its size and its time, or the tag of the object storage."""
        with told(f"{self.uri}/{path}"):
            facts = self._fs_root[0].info(self._full(path))
        if self.is_local:
            return f"{facts['size']} {Path(self.uri, path).stat().st_mtime_ns}"
        return f"{facts.get('size')} {facts.get('ETag', facts.get('LastModified'))}"

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading, with seek."""
        with told(f"{self.uri}/{path}"):
            stream = cast("BinaryIO", self._fs_root[0].open(self._full(path), "rb"))
        return stream if self.is_local else cast("BinaryIO", RemoteFile(stream, f"{self.uri}/{path}"))

    def read_bytes(self, path: str) -> bytes:
        """Read a whole file."""
        with told(f"{self.uri}/{path}"), self.open(path) as stream:
            return stream.read()

    def sha256(self, path: str) -> str:
        """SHA-256 of a file, read in bounded memory."""
        with told(f"{self.uri}/{path}"), self.open(path) as stream:
            return digest_stream(stream)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless the name is taken.

        Returns
        -------
        True if this call created the file; False if the name was taken, by whoever: the file is then untouched. After
        a connection that broke at a bad moment, the one who holds the name may be this very call: where it matters
        what the file holds, use `create_same`.

        Raises
        ------
        UserError, RunError
            If the place refuses the write or cannot be reached; see `corpus.store_errors.told`.
        """
        with told(f"{self.uri}/{path}"):
            if self.is_local:
                return _create_local(Path(self.uri) / path, data)
            return self._create_object(path, data)

    def _create_object(self, path: str, data: bytes) -> bool:
        fs, name = self._fs_root[0], self._full(path)
        for attempt in range(_ATTEMPTS):
            try:
                fs.pipe_file(name, data, mode="create", chunksize=_PART_BYTES)
            except Exception as error:
                if is_taken(error):
                    return False
                if attempt == _ATTEMPTS - 1 or not is_passing(error):
                    raise
                time.sleep(0.2 * 2**attempt)
                if fs.exists(name):  # written by the request whose answer was lost, or by somebody else
                    return False
            else:
                return True
        raise AssertionError("unreachable: the last attempt returns or raises")

    def create_same(self, path: str, data: bytes) -> bool:
        """Write a file whose name says what is in it; a name that is taken must hold these very bytes.

        Returns
        -------
        True if this call created the file, False if it was there.

        Raises
        ------
        RunError
            If the file is there with other bytes.
        """
        if self.create(path, data):
            return True
        if not self.holds(path, len(data), hashlib.sha256(data).hexdigest()):
            raise RunError(f"{self.uri}/{path}: is already there with another content; move it away and run again")
        return False

    def holds(self, path: str, size: int, sha256: str) -> bool:
        """Tell whether a file is there with this size and hash."""
        return self.exists(path) and self.size(path) == size and self.sha256(path) == sha256

    def create_from_file(self, path: str, source: Path) -> bool:
        """Like `create`, from a file on this machine (read as a whole on object storage)."""
        if not self.is_local:
            return self.create(path, source.read_bytes())
        with told(f"{self.uri}/{path}"), source.open("rb") as stream:
            return _create_local(Path(self.uri) / path, stream)

    def remove(self, path: str) -> None:
        """Remove one file. Only garbage collection and the end of a run call this; recovery never does."""
        with told(f"{self.uri}/{path}"):
            self._fs_root[0].rm_file(self._full(path))

    def unfinished(self) -> Iterator[tuple[str, float]]:
        """What killed writers left behind and no reader sees: (name, time of its start, in seconds since 1970).

        Temporary files on a local disk; on object storage uploads in parts, which are stored and billed.
        """
        fs, root = self._fs_root
        if self.is_local:
            for part in sorted(Path(self.uri).rglob(".*.part")):
                yield part.relative_to(self.uri).as_posix(), part.stat().st_mtime
            return
        bucket, _, prefix = root.partition("/")
        with told(self.uri):
            uploads = fs.list_multipart_uploads(bucket)
        for upload in uploads:
            if upload["Key"].startswith(f"{prefix}/"):
                name = f"{upload['Key'].removeprefix(f'{prefix}/')}?uploadId={upload['UploadId']}"
                yield name, upload["Initiated"].timestamp()

    def discard(self, name: str) -> None:
        """Remove something that `unfinished` has named."""
        if self.is_local:
            (Path(self.uri) / name).unlink(missing_ok=True)
            return
        fs, root = self._fs_root
        bucket, _, prefix = root.partition("/")
        key, _, upload = name.partition("?uploadId=")
        with told(f"{self.uri}/{key}"):
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=f"{prefix}/{key}", UploadId=upload)

    def walk(self) -> Iterator[str]:
        """Relative paths of all files below, sorted."""
        fs, root = self._fs_root
        prefix = root.rstrip("/") + "/"
        with told(self.uri):
            found = sorted(fs.find(root))
        for name in found:
            relative = name.removeprefix(prefix)
            if not any(part.startswith(".") for part in PurePosixPath(relative).parts):
                yield relative

    def download(self, target: Path) -> Path:
        """Copy every file below into a local folder; the folder itself if it is local already."""
        local = self.local_path()
        if local is not None:
            return local
        for name in self.walk():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read_bytes(name))
        return target


def match_uris(pattern: str) -> list[str]:
    """Files that a pattern with `*`, `?` or `**` stands for, sorted; a name without such a sign stands for itself.

    Local names come back absolute: whoever reads them may have been started in another folder.
    """
    if not any(sign in pattern for sign in "*?["):
        return [pattern if "://" in pattern else str(Path(pattern).absolute())]
    fs, path = url_to_fs(pattern)
    with told(pattern):
        found = sorted(str(name) for name in fs.glob(path))
    return found if "://" not in pattern else [fs.unstrip_protocol(name) for name in found]


def split_uri(uri: str) -> tuple[Store, str]:
    """Store of the folder that holds a file, and the file's name in it."""
    folder, _, name = uri.rpartition("/")
    return Store(folder or ("/" if uri.startswith("/") else ".")), name


def _create_local(target: Path, data: bytes | BinaryIO) -> bool:
    """Write a temporary file beside the target, then give it its name.

    `link` fails if the name is taken, where `rename` would overwrite. File and folder are flushed to the disk, so that
    after a power cut a file that is there is whole, and one that was reported as written is there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".part", delete=False) as part:
        try:
            if isinstance(data, bytes):
                part.write(data)
            else:
                shutil.copyfileobj(data, part)
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).chmod(0o644)
            os.link(part.name, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}:
                text = "this file system has no hard links, by which a file is created whole or not at all"
                raise UserError(f"{target}: {text}; choose another place for the output") from error
            raise
        finally:
            Path(part.name).unlink()
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True
