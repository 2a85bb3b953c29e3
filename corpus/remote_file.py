"""A file of object storage whose failures stay failures of the storage, whatever library reads it.

HDF5, zip and Parquet readers tell any failed read as a broken file. A connection that breaks in the middle must not
make data look damaged, so the failure is noted here as well, where the storage is spoken to.
"""

import io
from typing import Any, BinaryIO

from corpus.errors import RunError
from corpus.store_errors import told

_failures: list[str] = []


def forget_failures() -> None:
    """Start afresh, before a piece of work."""
    _failures.clear()


def noted_failure() -> str | None:
    """First failed read of this process since `forget_failures`, in one line; None if there was none."""
    return _failures[0] if _failures else None


class RemoteFile(io.RawIOBase):
    """A readable and seekable file.

    Parameters
    ----------
    inner
        As the storage library opened it.
    uri
        Names it in errors.
    """

    def __init__(self, inner: BinaryIO, uri: str) -> None:
        self._inner, self._uri = inner, uri

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is read yet."""
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        """Position."""
        return self._inner.tell()

    def read(self, size: int | None = -1) -> bytes:
        """Read, whole ranges in one request.

        Raises
        ------
        UserError, RunError
            As `corpus.store_errors.told` says.
        """
        try:
            with told(self._uri):
                return self._inner.read(-1 if size is None else size)
        except RunError as error:
            _failures.append(str(error))
            raise

    def readall(self) -> bytes:
        """Read what is left."""
        return self.read(-1)

    def readinto(self, buffer: Any) -> int:
        """Read into memory."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Let go."""
        if not self.closed:
            self._inner.close()
        super().close()
