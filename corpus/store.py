"""One door to local folders and object storage: read, list, and create-if-absent.

Nothing here overwrites or renames: a name is either absent or holds what its first writer put there. That single
property carries the commit protocol of a corpus (docs/corpus-format.md).
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from corpus.errors import UserError
from corpus.hashing import digest_stream


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
        return bool(self._fs_root[0].exists(self._full(path)))

    def size(self, path: str) -> int:
        """Size of a file in bytes."""
        return int(self._fs_root[0].size(self._full(path)))

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders directly inside `folder`, sorted; empty if there is no such folder."""
        fs, _ = self._fs_root
        with contextlib.suppress(FileNotFoundError):
            found = fs.ls(self._full(folder), detail=False)
            # `.` names are writers' temporary files that a killed process left behind.
            names = {PurePosixPath(name).name for name in found}
            return sorted(name for name in names if not name.startswith("."))
        return []

    def modified(self, path: str) -> float:
        """Time of last change, in seconds since 1970."""
        return float(self._fs_root[0].modified(self._full(path)).timestamp())

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading, with seek."""
        fs, _ = self._fs_root
        try:
            return cast("BinaryIO", fs.open(self._full(path), "rb"))
        except FileNotFoundError as error:
            raise UserError(f"{self.uri}/{path}: no such file") from error

    def read_bytes(self, path: str) -> bytes:
        """Read a whole file."""
        with self.open(path) as stream:
            return stream.read()

    def sha256(self, path: str) -> str:
        """SHA-256 of a file, read in bounded memory."""
        with self.open(path) as stream:
            return digest_stream(stream)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless the name is taken.

        Returns
        -------
        True if this call created the file; False if the name was taken, by whoever: the file is then untouched.
        """
        if self.is_local:
            return _create_local(Path(self.uri) / path, data)
        fs, _ = self._fs_root
        try:
            fs.pipe_file(self._full(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    def create_from_file(self, path: str, source: Path) -> bool:
        """Like `create`, from a file on this machine (read as a whole on object storage)."""
        if not self.is_local:
            return self.create(path, source.read_bytes())
        target = Path(self.uri) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".part", delete=False) as part:
            with source.open("rb") as stream:
                shutil.copyfileobj(stream, part)
            part.flush()
            os.fsync(part.fileno())
        return _publish(Path(part.name), target)

    def remove(self, path: str) -> None:
        """Remove one file. Only garbage collection and the end of a run call this; recovery never does."""
        self._fs_root[0].rm_file(self._full(path))

    def walk(self) -> Iterator[str]:
        """Relative paths of all files below, sorted."""
        fs, root = self._fs_root
        prefix = root.rstrip("/") + "/"
        for name in sorted(fs.find(root)):
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
    """Files that a pattern with `*`, `?` or `**` stands for, sorted; a name without such a sign stands for itself."""
    if not any(sign in pattern for sign in "*?["):
        return [pattern]
    fs, path = url_to_fs(pattern)
    found = sorted(str(name) for name in fs.glob(path))
    return found if "://" not in pattern else [fs.unstrip_protocol(name) for name in found]


def split_uri(uri: str) -> tuple[Store, str]:
    """Store of the folder that holds a file, and the file's name in it."""
    folder, _, name = uri.rpartition("/")
    return Store(folder or ("/" if uri.startswith("/") else ".")), name


def _create_local(target: Path, data: bytes) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".part", delete=False) as part:
        part.write(data)
        part.flush()
        os.fsync(part.fileno())
    return _publish(Path(part.name), target)


def _publish(part: Path, target: Path) -> bool:
    """Give a finished temporary file its name: `link` fails if the name is taken, `rename` would overwrite."""
    part.chmod(0o644)
    try:
        os.link(part, target)
    except FileExistsError:
        return False
    finally:
        part.unlink()
    return True
