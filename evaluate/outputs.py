"""Writing one file, local or on object storage, so that it appears whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from corpus.errors import UserError
from corpus.store import Store


class OutputFile:
    """One file to write, local or on object storage: it appears whole or not at all."""

    def __init__(self, uri: str, suffix: str) -> None:
        name = PurePosixPath(uri).name
        if not name.endswith(suffix):
            raise UserError(f"out: {uri!r} must end in {suffix}")
        self.name = name
        self.folder = Store(uri[: -len(name)].rstrip("/") or ("/" if uri.startswith("/") else "."))

    def __str__(self) -> str:
        return f"{self.folder.uri}/{self.name}"

    def exists(self) -> bool:
        """Tell whether the file is there."""
        return self.folder.exists(self.name)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Give a local path to write; when the block ends well, it takes the file's name, replacing what had it."""
        place = self.folder.local_path()
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".part-") as scratch:
            part = Path(scratch) / self.name
            yield part
            if place is not None:
                part.replace(place / self.name)
                return
            if self.exists():
                self.folder.remove(self.name)
            self.folder.create_from_file(self.name, part)

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """Give a local path to read from."""
        place = self.folder.local_path()
        if place is not None:
            yield place / self.name
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / self.name
            copy.write_bytes(self.folder.read_bytes(self.name))
            yield copy
