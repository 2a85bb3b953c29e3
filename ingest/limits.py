"""What reading one source may cost: settings of the machine, which decide nothing about the cells of a corpus."""

from pydantic import Field

from corpus.settings import Settings

GB = 1_000_000_000


class Limits(Settings):
    """A file that asks for more is refused, or its reader is ended; the run goes on without harm."""

    reader_memory_gb: float = Field(8.0, gt=0)
    """Memory that reading one work unit may take beyond that of the program itself."""
    reader_minutes: float = Field(60.0, gt=0)
    """Longest time for looking at a source or for reading one work unit."""
    max_cells: int = Field(100_000_000, ge=1)
    """Most rows of a source."""
    max_features: int = Field(1_000_000, ge=1)
    """Most columns of a source."""
    max_dataset_gb: float = Field(500.0, gt=0)
    """Largest array inside a source, as declared (rows x columns x bytes each), whatever its compressed size."""
    max_expansion: float = Field(20_000.0, ge=1)
    """Most declared bytes of an array for each byte that the file stores for it (gzip reaches 1,032)."""


_active = Limits()


def active_limits() -> Limits:
    """Limits that hold in this process: those of the run in a reader process, the defaults elsewhere."""
    return _active


def activate(limits: Limits) -> None:
    """Make limits hold in this process; called once, when a reader process starts."""
    global _active
    _active = limits
