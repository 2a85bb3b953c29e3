"""The files of a source: finding them, naming their content, and opening them, packed or not."""

import contextlib
import errno
import gzip
import io
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, BinaryIO, cast

import pyarrow as pa

from corpus.errors import UserError
from corpus.hashing import digest_json
from corpus.store import Store, split_uri

_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class SourceFiles:
    """Files that make one source, in one folder.

    Parameters
    ----------
    store
        The folder.
    names
        Relative names; the first is the matrix.
    """

    store: Store
    names: Sequence[str]

    @classmethod
    def single(cls, uri: str) -> "SourceFiles":
        """A source of one file."""
        store, name = split_uri(uri)
        return cls(store, (name,))

    def fingerprint(self) -> str:
        """SHA-256 of the file, or of the sorted names and SHA-256 of several."""
        if len(self.names) == 1:
            return self.store.sha256(self.names[0])
        return digest_json({name: self.store.sha256(name) for name in sorted(self.names)})

    def version(self) -> str:
        """What changes when one of the files is touched."""
        return digest_json({name: self.store.version(name) for name in sorted(self.names)})

    def size_bytes(self) -> int:
        """Bytes of all files together, as stored."""
        return sum(self.store.size(name) for name in self.names)


@contextlib.contextmanager
def source_errors(uri: str, what: str) -> Iterator[None]:
    """Turn whatever a library says about a broken source into one line that names it.

    Parameters
    ----------
    what
        What the file should have been: `a readable loom file`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError(
                f"{uri}: no space left in {tempfile.gettempdir()}, where it is staged; TMPDIR names another folder"
            ) from error
        raise UserError(f"{uri}: not {what}: {_short(error)}") from error
    except (
        EOFError, KeyError, ValueError, TypeError, IndexError, RuntimeError, OverflowError,
        zlib.error, zipfile.BadZipFile, pa.ArrowException,
    ) as error:  # fmt: skip
        raise UserError(f"{uri}: not {what}: {_short(error)}") from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_LENGTH else text[:_MESSAGE_LENGTH] + " ..."


@contextlib.contextmanager
def open_unpacked(store: Store, name: str) -> Iterator[BinaryIO]:
    """Open a file for reading in sequence: gzip and zip (of one file) are told by their first bytes, not by name.

    Raises
    ------
    UserError
        If a zip holds no file, or more than one.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(store.open(name))
        start = stream.read(4)
        stream.seek(0)
        if start[:2] == b"\x1f\x8b":
            yield cast("BinaryIO", stack.enter_context(gzip.open(cast("IO[bytes]", stream))))
        elif start == b"PK\x03\x04":
            archive = stack.enter_context(zipfile.ZipFile(stream))
            members = [
                item.filename
                for item in archive.infolist()
                if not item.is_dir() and not item.filename.startswith("__MACOSX/")
            ]
            if len(members) != 1:
                found = ", ".join(members[:5]) or "none"
                raise UserError(f"{store.uri}/{name}: expected one file in the archive, found {len(members)} ({found})")
            yield cast("BinaryIO", stack.enter_context(archive.open(members[0])))
        else:  # files of object storage lack readline with a limit
            yield stack.enter_context(io.BufferedReader(cast("io.RawIOBase", stream)))
