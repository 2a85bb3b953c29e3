"""Gene set enrichment of ranked genes, with gseapy and a GMT file that the user gives; nothing is fetched."""

import numpy as np
import polars as pl

from corpus.errors import UserError
from corpus.store import split_uri

MIN_SIZE, MAX_SIZE = 5, 500
_PERMUTATIONS = 1000


def read_gene_sets(uri: str) -> dict[str, list[str]]:
    """Read a GMT file: a line a set, with name, description and symbols between tabs.

    Raises
    ------
    UserError
        If there is no such file, a line is too short, or a name comes twice.
    """
    store, path = split_uri(uri)
    if not store.exists(path):
        raise UserError(f"gene_sets: {uri}: no such file")
    try:
        text = store.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"gene_sets: {uri}: not a text file") from error
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        symbols = list(dict.fromkeys(symbol.strip() for symbol in rest[1:] if symbol.strip()))
        if not symbols:
            raise UserError(f"gene_sets: {uri}: line {number}: expected a name, a description and genes between tabs")
        if name in sets:
            raise UserError(f"gene_sets: {uri}: line {number}: the set {name!r} was there before")
        sets[name] = symbols
    if not sets:
        raise UserError(f"gene_sets: {uri}: no gene set in it")
    return sets


def enrich(block: pl.DataFrame, gene_sets: dict[str, list[str]], seed: int) -> pl.DataFrame:
    """Pre-ranked gene set enrichment (Subramanian et al., PNAS 102, 15545-15550, 2005) of the tested genes.

    Genes are ranked by their excess over matched genes, or where there is no null by their mean shift; a permutation
    gives genes' names to other genes, so sets of genes that act alike for any reason come out.

    Parameters
    ----------
    block
        `symbol`, `mean`, `excess`, `p_value` of one state; genes without a p-value are left out.
    gene_sets
        Name to symbols, matched in any case, so that human sets may be tried on mouse genes.

    Returns
    -------
    One row a set of 5 to 500 tested genes, by false discovery rate: `gene_set`, `size` (tested genes in it),
    `enrichment_score`, `normalized_score` (positive towards the goal), `p_value`, `fdr`, `leading_genes`.

    Raises
    ------
    UserError
        If gseapy is not installed, or no set has enough tested genes.
    """
    try:
        import gseapy
    except ImportError as error:
        raise UserError('gene_sets: gseapy is not installed: pip install -e ".[enrichment]"') from error
    tested = block.filter(pl.col("p_value").is_not_null()).with_columns(
        pl.coalesce("excess", "mean").alias("effect"), pl.col("symbol").str.to_uppercase().alias("name")
    )
    tested = tested.unique("name", keep="first", maintain_order=True).sort(["effect", "name"], descending=[True, False])
    known = set(tested["name"])
    usable = {name: [gene for gene in map(str.upper, genes) if gene in known] for name, genes in gene_sets.items()}
    usable = {name: genes for name, genes in usable.items() if MIN_SIZE <= len(genes) <= MAX_SIZE}
    if not usable:
        raise UserError(
            f"gene_sets: none of {len(gene_sets)} sets has {MIN_SIZE} to {MAX_SIZE} of the {len(tested)} tested genes"
        )
    ranking = tested.select("name", "effect").to_pandas().set_index("name")["effect"]
    result = gseapy.prerank(
        rnk=ranking, gene_sets=usable, min_size=MIN_SIZE, max_size=MAX_SIZE, permutation_num=_PERMUTATIONS,
        seed=seed, threads=1, outdir=None, no_plot=True, verbose=False,
    ).res2d  # fmt: skip
    table = pl.DataFrame(
        {
            "gene_set": result["Term"].astype(str).to_list(),
            "size": [len(usable[name]) for name in result["Term"]],
            "enrichment_score": result["ES"].astype(float).to_numpy(),
            "normalized_score": result["NES"].astype(float).to_numpy(),
            "p_value": np.asarray(result["NOM p-val"], dtype=float),
            "fdr": np.asarray(result["FDR q-val"], dtype=float),
            "leading_genes": result["Lead_genes"].astype(str).to_list(),
        }
    )
    return table.sort("fdr", "gene_set")
