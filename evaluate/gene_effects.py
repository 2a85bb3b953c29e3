"""What a perturbation does to the embedding of each other gene: rows in memory, and their table."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from corpus.genes import GeneTable
from evaluate.perturb import Edits


@dataclass(frozen=True)
class GeneEffects:
    """One row for each perturbation and gene that it left in place.

    Parameters
    ----------
    rows
        int64[n]: number of the perturbation.
    tokens
        int64[n]: the affected gene.
    similarity
        float64[n]: cosine between its embedding after and before.
    """

    rows: np.ndarray
    tokens: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def empty() -> "GeneEffects":
        """No rows."""
        return GeneEffects(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))

    @staticmethod
    def concatenate(parts: list["GeneEffects"]) -> "GeneEffects":
        """Join rows."""
        return GeneEffects(*(np.concatenate([getattr(p, name) for p in parts]) for name in GeneEffects.__annotations__))

    def take(self, rows: np.ndarray) -> "GeneEffects":
        """Select rows."""
        return GeneEffects(self.rows[rows], self.tokens[rows], self.similarity[rows])

    def of_rows(self, start: int) -> "GeneEffects":
        """Number the perturbations from `start`."""
        return GeneEffects(self.rows + start, self.tokens, self.similarity)

    def in_order(self) -> "GeneEffects":
        """Sort by perturbation; the genes of one keep their order."""
        return self.take(np.argsort(self.rows, kind="stable"))

    def most_changed(self, number: int) -> "GeneEffects":
        """Keep the `number` least similar genes of each perturbation; of equal ones those with the lowest tokens."""
        order = np.lexsort((self.tokens, self.similarity, self.rows))
        rows = self.rows[order]
        place = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
        return self.take(order[place < number])


def gene_path(unit_id: str) -> str:
    """File of a unit, relative to the scan's folder."""
    return f"gene_shifts/{unit_id}.parquet"


def gene_schema(joint: bool) -> pa.Schema:
    """Arrow schema of the table.

    Parameters
    ----------
    joint
        Whether a row can perturb several genes; `ensembl_id` is then a list.

    Returns
    -------
    `ensembl_id` is the perturbed gene, `affected_ensembl_id` the other one, `similarity` the cosine between the
    embeddings of the latter after and before.
    """
    return pa.schema(
        [
            pa.field("cell_id", pa.string(), nullable=False),
            pa.field("donor_id", pa.string()),
            pa.field("perturbation", pa.string(), nullable=False),
            pa.field("ensembl_id", pa.list_(pa.string()) if joint else pa.string(), nullable=False),
            pa.field("affected_ensembl_id", pa.string(), nullable=False),
            pa.field("similarity", pa.float32(), nullable=False),
        ]
    )


def gene_table(
    obs: pl.DataFrame, edits: list[Edits], effects: GeneEffects, genes: GeneTable, perturbation: str, joint: bool
) -> pa.Table:
    """Lay out the rows of some cells.

    Parameters
    ----------
    obs
        `cell_id` and `donor_id`, one row a cell.
    edits
        One entry a cell; `effects.rows` numbers their rows.
    """
    cell = np.repeat(np.arange(len(edits)), [len(edit) for edit in edits])[effects.rows]
    row_of_token = np.zeros(genes.vocab_size, dtype=np.int64)
    row_of_token[genes.tokens] = np.arange(len(genes.tokens))
    names = pa.array(genes.ensembl_ids)
    perturbed = Edits.concatenate(edits).genes[effects.rows]
    real = perturbed >= 0
    ids = names.take(pa.array(row_of_token[perturbed[real]]))
    if joint:
        ids = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(real.sum(axis=1))]), pa.int32()), ids)
    return pa.table(
        [
            pa.array(obs["cell_id"].cast(pl.String).to_list(), pa.string()).take(pa.array(cell)),
            pa.array(obs["donor_id"].cast(pl.String).to_list(), pa.string()).take(pa.array(cell)),
            pa.array([perturbation], pa.string()).take(pa.array(np.zeros(len(cell), np.int64))),
            ids,
            names.take(pa.array(row_of_token[effects.tokens])),
            pa.array(effects.similarity.astype(np.float32)),
        ],
        schema=gene_schema(joint),
    )
