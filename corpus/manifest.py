"""The only door to a corpus: a numbered list of its shards, created once and never edited."""

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from corpus.errors import RunError, UserError
from corpus.schema import FORMAT_VERSION
from corpus.store import Store

_FOLDER = "manifests"


class Record(BaseModel):
    """Base of everything written as JSON: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> bytes:
        """Serialise; the same record always gives the same bytes."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def unit_shard(unit_id: str) -> str:
    """Path of a unit's shard inside the corpus."""
    return f"shards/{unit_id}.parquet"


def unit_record(unit_id: str) -> str:
    """Path of a unit's record inside the corpus."""
    return f"units/{unit_id}.json"


class Unit(Record):
    """One work unit: a row range of one source file, as it ended up in one shard."""

    unit_id: str
    dataset_id: str
    source: str
    source_sha256: str
    start: int
    stop: int
    rows: int
    dropped: dict[str, int]
    row_groups: list[int]
    num_tokens: int
    size_bytes: int
    sha256: str
    content_sha256: str

    @property
    def shard(self) -> str:
        """Path of the shard inside the corpus."""
        return unit_shard(self.unit_id)

    @property
    def record(self) -> str:
        """Path of this record inside the corpus."""
        return unit_record(self.unit_id)


class Manifest(Record):
    """What a corpus holds.

    Parameters
    ----------
    number
        Position in the corpus's history; the highest number counts.
    genes
        Path of the gene table, named by its hash.
    genes_hash
        Content hash of the gene table.
    obs_columns
        Label columns of the shards.
    plan
        Hash of the sources' contents and the settings that led here; a run whose plan is published has nothing to do.
    units
        In the order of the sources; readers number cells in this order.
    quarantined
        Dataset ids that were asked for and are not here, with the reason: their sources could not be read.
    report
        Path of the account of the run that made this manifest.
    """

    format_version: int = FORMAT_VERSION
    number: int
    plan: str
    genes: str
    genes_hash: str
    obs_columns: list[str]
    units: list[Unit]
    quarantined: dict[str, str] = {}
    report: str = ""

    @property
    def num_cells(self) -> int:
        """Cells in all shards."""
        return sum(unit.rows for unit in self.units)

    @property
    def path(self) -> str:
        """Where this manifest lies inside a corpus."""
        return f"{_FOLDER}/{self.number:06d}.json"

    def publish(self, store: Store) -> None:
        """Create the manifest file.

        Raises
        ------
        RunError
            If another run has published this number with other content.
        """
        if not store.create(self.path, self.to_json()) and store.read_bytes(self.path) != self.to_json():
            raise RunError(f"{store.uri}/{self.path}: another run has published this number first; run again")

    @classmethod
    def numbers(cls, store: Store) -> list[int]:
        """Numbers of the published manifests, ascending."""
        names = store.names(_FOLDER)
        return sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit())

    @classmethod
    def read(cls, store: Store, number: int | None = None) -> Self:
        """Read one manifest, the newest if no number is given.

        Raises
        ------
        UserError
            If there is none, or if it is not a manifest of this format version.
        """
        if number is None:
            numbers = cls.numbers(store)
            if not numbers:
                raise UserError(f"{store.uri}: no corpus here (no manifests/*.json; did `ingest run` finish?)")
            number = numbers[-1]
        path = f"{_FOLDER}/{number:06d}.json"
        try:
            manifest = cls.model_validate_json(store.read_bytes(path))
        except ValidationError as error:
            raise UserError(f"{store.uri}/{path}: not a corpus manifest: {error.errors()[0]['msg']}") from error
        if manifest.format_version != FORMAT_VERSION:
            raise UserError(
                f"{store.uri}/{path}: format version {manifest.format_version}; this program reads {FORMAT_VERSION}"
            )
        return manifest
