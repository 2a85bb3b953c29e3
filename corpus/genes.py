"""The frozen vocabulary of a corpus: which gene is which token, and its median."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.errors import UserError
from corpus.hashing import digest_table
from corpus.schema import MASK, SPECIAL_TOKENS
from corpus.store import Store

GENES_SCHEMA = pa.schema(
    [
        pa.field("token", pa.uint16(), nullable=False),
        pa.field("ensembl_id", pa.string(), nullable=False),
        pa.field("symbol", pa.string()),
        pa.field("biotype", pa.string()),
        pa.field("median", pa.float64(), nullable=False),
        pa.field("n_cells", pa.uint64(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class GeneTable:
    """Genes of a vocabulary, one row each, in token order.

    Parameters
    ----------
    table
        Arrow table of `GENES_SCHEMA`: `median` is the gene's non-zero median of counts per 10,000, `n_cells` the
        number of cells that it was taken over (0 where an imported vocabulary does not say).

    Raises
    ------
    UserError
        On a repeated token or Ensembl id, or a median that is not a positive number: such a table would put
        NaN or infinity into the ranking.
    """

    table: pa.Table

    def __post_init__(self) -> None:
        if self.table.schema != GENES_SCHEMA:
            raise UserError(f"gene table: expected columns {GENES_SCHEMA.names}, found {self.table.schema.names}")
        ids, medians = self.ensembl_ids, self.table["median"].to_numpy()
        if len(ids) == 0:
            raise UserError("gene table: it has no genes")
        bad = ~(np.isfinite(medians) & (medians > 0))
        if bad.any():
            raise UserError(f"gene table: the median of {ids[int(np.argmax(bad))]} is not a positive number")
        if np.any(np.diff(self.tokens.astype(np.int64)) <= 0):
            raise UserError("gene table: tokens are not unique and ascending")
        if len(set(ids)) != len(ids):
            raise UserError("gene table: an Ensembl id occurs twice")
        if self.tokens[0] <= MASK:
            taken = SPECIAL_TOKENS[self.tokens[0]]
            raise UserError(f"gene table: {ids[0]} has token {self.tokens[0]}, which is reserved for {taken}")

    @classmethod
    def own(
        cls, ensembl_ids: list[str], symbols: list[str], biotypes: list[str], medians: np.ndarray, n_cells: np.ndarray
    ) -> "GeneTable":
        """Build a vocabulary of our own: four special tokens, then the genes in Ensembl id order."""
        if ensembl_ids != sorted(ensembl_ids):
            raise ValueError("genes must come in Ensembl id order")
        last = len(SPECIAL_TOKENS) + len(ensembl_ids)
        if last > np.iinfo(np.uint16).max + 1:
            raise UserError(f"gene table: {len(ensembl_ids)} genes do not fit 16-bit tokens")
        tokens = np.arange(len(SPECIAL_TOKENS), last, dtype=np.uint16)
        columns = [tokens, ensembl_ids, symbols, biotypes, medians, n_cells]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, GENES_SCHEMA, strict=True)]
        return cls(pa.table(arrays, schema=GENES_SCHEMA))

    @cached_property
    def hash(self) -> str:
        """Content hash: what a model folder and a corpus compare."""
        return digest_table(self.table)[:16]

    @property
    def path(self) -> str:
        """Where the table lies inside a corpus."""
        return f"genes/{self.hash}.parquet"

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16[genes], ascending."""
        return self.table["token"].to_numpy()

    @cached_property
    def ensembl_ids(self) -> list[str]:
        """Ensembl ids in token order."""
        return self.table["ensembl_id"].to_pylist()

    @cached_property
    def symbols(self) -> list[str]:
        """Symbols in token order; the Ensembl id where a gene has none."""
        pairs = zip(self.table["symbol"].to_pylist(), self.ensembl_ids, strict=True)
        return [symbol or ensembl_id for symbol, ensembl_id in pairs]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Reserved tokens by name: always `<pad>` and `<mask>`; an imported vocabulary may lack `<cls>` and `<eos>`.

        In the human Geneformer V1 vocabulary, for one, tokens 2 and 3 are genes: putting `<cls>` before its cells would
        put a gene there.
        """
        genes = set(self.tokens[: len(SPECIAL_TOKENS)].tolist())
        return {name: token for token, name in enumerate(SPECIAL_TOKENS) if token not in genes}

    @property
    def is_imported(self) -> bool:
        """Whether this is a published vocabulary: none of those says how many cells its medians were taken over."""
        return not self.table["n_cells"].to_numpy().any()

    @property
    def vocab_size(self) -> int:
        """Rows that a model's token embedding needs: the highest token and one, special tokens included."""
        return max(int(self.tokens[-1]) + 1, len(SPECIAL_TOKENS))

    @cached_property
    def medians_by_token(self) -> np.ndarray:
        """float64[vocab_size]; NaN where a token is no gene."""
        medians = np.full(self.vocab_size, np.nan)
        medians[self.tokens] = self.table["median"].to_numpy()
        return medians

    @cached_property
    def token_of(self) -> dict[str, int]:
        """Ensembl id to token."""
        return dict(zip(self.ensembl_ids, self.tokens.tolist(), strict=True))

    def find(self, name: str) -> int:
        """Token of a gene given by Ensembl id or by symbol (exact case first, then any case if unambiguous).

        Raises
        ------
        UserError
            If no gene, or more than one, answers to the name.
        """
        if name in self.token_of:
            return self.token_of[name]
        for same in (lambda symbol: symbol == name, lambda symbol: symbol.lower() == name.lower()):
            hits = [int(token) for token, symbol in zip(self.tokens, self.symbols, strict=True) if same(symbol)]
            if len(hits) == 1:
                return hits[0]
            if hits:
                raise UserError(f"gene {name!r}: {len(hits)} genes have this symbol; give the Ensembl id")
        raise UserError(f"gene {name!r}: neither an Ensembl id nor a symbol of this vocabulary")

    def save(self, store: Store) -> None:
        """Write the table into a corpus or a model folder, under its hash."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, compression="zstd")
        store.create(self.path, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, store: Store, path: str) -> "GeneTable":
        """Read a table and check that its content still has the hash that names it."""
        with store.open(path) as stream:
            table = pq.read_table(stream).cast(GENES_SCHEMA)
        genes = cls(table.combine_chunks())
        if genes.path != path:
            raise UserError(f"{store.uri}/{path}: content hash is {genes.hash}: the file was changed")
        return genes
