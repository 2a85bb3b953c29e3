"""Names, types and fixed numbers of corpus format version 1 (docs/corpus-format.md)."""

from collections.abc import Sequence

import pyarrow as pa

FORMAT_VERSION = 1

PAD, MASK, CLS, EOS = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<mask>", "<cls>", "<eos>")
"""Reserved at the head of a vocabulary of our own; an imported vocabulary may hold them elsewhere, or lack some."""

COUNTS_PER_CELL = 10_000.0
"""Counts of a cell are scaled to this total before medians are taken (Theodoris et al. 2023, Methods)."""

OBS_COLUMNS = (
    "cell_type",
    "tissue",
    "disease",
    "donor_id",
    "assay",
    "sex",
    "development_stage",
    "organism",
)
"""Cell labels under their CELLxGENE schema names; null where a source lacks one."""

ROW_GROUP_CELLS = 1024

# Elements are declared never to be null: readers need not look for nulls, which makes lists a third faster to read.
TOKENS_TYPE = pa.list_(pa.field("element", pa.uint16(), nullable=False))
COUNTS_TYPE = pa.list_(pa.field("element", pa.uint32(), nullable=False))


def obs_names(extra_obs: Sequence[str] = ()) -> list[str]:
    """Label columns of a shard: the CELLxGENE ones and then the configured ones, each once."""
    return [*OBS_COLUMNS, *(name for name in extra_obs if name not in OBS_COLUMNS)]


def shard_schema(extra_obs: Sequence[str] = ()) -> pa.Schema:
    """Arrow schema of a ranked shard.

    Parameters
    ----------
    extra_obs
        Further label columns that the ingest settings name.

    Returns
    -------
    `n_counts` in UMIs over all gene-expression features, `mito_fraction` in 0..1, `tokens` in rank order, never
    truncated, `counts` the raw counts (UMIs) of those tokens.
    """
    return pa.schema(
        [
            pa.field("cell_id", pa.string(), nullable=False),
            pa.field("dataset_id", pa.string(), nullable=False),
            *(pa.field(name, pa.string()) for name in obs_names(extra_obs)),
            pa.field("n_counts", pa.uint32(), nullable=False),
            pa.field("n_genes", pa.uint32(), nullable=False),
            pa.field("mito_fraction", pa.float32(), nullable=False),
            pa.field("length", pa.uint32(), nullable=False),
            pa.field("tokens", TOKENS_TYPE, nullable=False),
            pa.field("counts", COUNTS_TYPE, nullable=False),
        ]
    )
