"""A scan's rows in blocks of whole cells, so that statistics need memory for genes and not for cells."""

import hashlib
import io
from collections.abc import Iterator, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.errors import UserError
from corpus.store import Store
from evaluate.shifts import ScanManifest, iter_gene_shifts, shifts_schema
from evaluate.stats import KEYS

_BLOCK_ROWS = 400_000


class ShiftBlocks:
    """Rows of a finished scan: of the files that its manifest names, and no others, each with its hash checked.

    Parameters
    ----------
    uri
        Folder of the scan.
    block_rows
        Rows of a block, at least; a block ends where a cell does.

    Raises
    ------
    UserError
        If there is no manifest; while iterating, if a file is missing or was changed.
    """

    def __init__(self, uri: str, block_rows: int = _BLOCK_ROWS) -> None:
        self.store, self.block_rows = Store(uri), block_rows
        self.manifest = ScanManifest.read(self.store)

    def blocks(self, values: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Yield the rows of some cells, in the order of the scan.

        Parameters
        ----------
        values
            Columns wanted besides those of `KEYS`.

        Returns
        -------
        Frames with one key a row: the genes of a set are joined by "+" (so are its symbols), and its rank is the mean
        of the genes that were there, -1 if none was.
        """
        manifest = self.manifest
        schema = shifts_schema(manifest.columns, manifest.states, manifest.labels, manifest.joint)
        columns = list(dict.fromkeys([*vars(KEYS).values(), *values]))
        waiting: list[pl.DataFrame] = []
        for unit in manifest.units:
            frame = _flat(self._read(unit.path, unit.sha256, columns, schema), manifest.joint)
            waiting.append(frame)
            if sum(map(len, waiting)) >= self.block_rows:
                rows = pl.concat(waiting)
                # The last cell may go on in the next file.
                open_cell = rows[KEYS.cell] == rows[KEYS.cell][-1]
                if not open_cell.all():
                    yield rows.filter(~open_cell)
                    waiting = [rows.filter(open_cell)]
        if any(len(frame) for frame in waiting):
            yield pl.concat(waiting)

    def _read(self, path: str, sha256: str, columns: list[str], schema: pa.Schema) -> pl.DataFrame:
        data = self.store.read_bytes(path)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{self.store.uri}/{path}: not the file that the manifest names (SHA-256 differs)")
        frame = pl.from_arrow(pq.read_table(io.BytesIO(data), schema=schema, columns=columns))
        assert isinstance(frame, pl.DataFrame)
        return frame.select(columns)


def _flat(frame: pl.DataFrame, joint: bool) -> pl.DataFrame:
    if not joint:
        return frame
    there = pl.col(KEYS.rank).list.eval(pl.element().filter(pl.element() >= 0)).list.mean()
    joined = [pl.col(name).list.join("+") for name in (KEYS.gene, "symbol") if name in frame.columns]
    return frame.with_columns(*joined, there.fill_null(-1).alias(KEYS.rank))


def gene_shift_blocks(scan: ShiftBlocks) -> Iterator[pl.DataFrame]:
    """Yield the effects on other genes' embeddings; the genes of a set are joined by "+".

    Raises
    ------
    UserError
        If the scan has none, or if a file is missing or was changed.
    """
    for frame in iter_gene_shifts(scan.store.uri):
        yield frame.with_columns(pl.col(KEYS.gene).list.join("+")) if scan.manifest.joint else frame
