"""Names of features: which column holds the ids, and whose genome a prefix means."""

import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

from corpus.errors import UserError
from corpus.hashing import digest_json
from ingest.formats import GENE_EXPRESSION, OTHER_SPECIES, Features
from ingest.mapping import ensembl_share
from ingest.settings import Source

# Assembly names as reference builders write them; UCSC, GRC and Ensembl each have their own.
_ASSEMBLIES = {
    "mouse": r"mm(?:9|10|39)|GRCm3[789]|NCBIM37|mouse",
    "human": r"hg(?:18|19|38)|GRCh3[678]|human|T2T-CHM13",
    "rat": r"rn[4-8]|Rnor_?6\.0|mRatBN7\.2|GRCr8",
    "zebrafish": r"danRer\d+|GRCz1[012]",
    "pig": r"susScr\d+|Sscrofa\d+\.\d",
    "chicken": r"galGal\d+|GRCg[67][a-z]*",
    "macaque": r"rheMac\d+|Mmul_\d+",
    "fruit fly": r"dm[36]|BDGP[56]",
    "worm": r"ce1[01]|WBcel235",
    "yeast": r"sacCer3|R64-1-1",
}
# A reference's release follows its assembly: `GRCh38-2020-A`, `mm10-3.0.0_premrna`, `GRCm38.p6`.
_RELEASE = r"(?:[-.][A-Za-z0-9.\-]+)?(?:_premrna)?"
_ASSEMBLY = {species: re.compile(rf"(?:{names}){_RELEASE}\Z", re.IGNORECASE) for species, names in _ASSEMBLIES.items()}
_PREFIXED = {
    species: re.compile(rf"(?:{names}){_RELEASE}_+(?=\S)", re.IGNORECASE) for species, names in _ASSEMBLIES.items()
}
_ANY_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9.\-]*)_+(?=\S)")
_ENSEMBL_SPECIES = {"mouse": "ENSMUSG", "human": "ENSG"}
# Alone, or at the end of a longer name (`Gcg_ENSMUSG00000000394.15` in PanglaoDB).
_ENSEMBL = re.compile(r"(?:.*[_\-|])?(ENS[A-Z]*G)\d{11}(?:\.\d+)?\Z", re.IGNORECASE)
_UNRESOLVED_SHARE = 0.2
_UNRESOLVED_SHARE_BESIDE_KNOWN = 0.01
# A source is opened once for each of its units, and its 30,000 names stay the same.
_chosen: OrderedDict[str, Features] = OrderedDict()
_CHOSEN_KEPT = 4


def species_of_assembly(name: str, source: Source) -> str | None:
    """Species of a genome's name (`mm10`, `GRCh38-2020-A`), from the source's `genomes` first; None if unknown."""
    if name in source.genomes:
        return source.genomes[name]
    return next((species for species, pattern in _ASSEMBLY.items() if pattern.match(name)), None)


def choose_features(
    columns: Mapping[str, Sequence[str]],
    source: Source,
    *,
    kinds: Sequence[str] | None = None,
    genomes: Sequence[str] | None = None,
) -> Features:
    """Pick the names to map, take genome prefixes off, and mark what is not of the declared species.

    Parameters
    ----------
    columns
        Candidate names by column, all of one length. The source's `gene_column` wins, then the column with the
        largest share of Ensembl ids, then the first.
    kinds
        Feature type of each feature, where the source says it.
    genomes
        Genome of each feature, where the source has several.

    Returns
    -------
    Features whose kind is `OTHER_SPECIES` where the prefix, the genome or the form of the Ensembl id is that of another
    species than `source.species`.

    Raises
    ------
    UserError
        If `gene_column` is not there, or a prefix or genome is of no known species.
    """
    rules = [source.gene_column, source.species, source.genomes]
    key = digest_json([{name: list(names) for name, names in columns.items()}, kinds, genomes, rules])
    if key not in _chosen:
        _chosen[key] = _choose(columns, source, kinds, genomes)
        while len(_chosen) > _CHOSEN_KEPT:
            _chosen.popitem(last=False)
    _chosen.move_to_end(key)
    return _chosen[key]


def _choose(
    columns: Mapping[str, Sequence[str]], source: Source, kinds: Sequence[str] | None, genomes: Sequence[str] | None
) -> Features:
    if source.gene_column is not None:
        if source.gene_column not in columns:
            there = ", ".join(name for name in columns if name) or "none"
            raise UserError(f"{source.uri}: no gene column {source.gene_column!r}; there are {there}")
        columns = {source.gene_column: columns[source.gene_column]}
    bare = {column: [_split(name, source) for name in names] for column, names in columns.items()}
    shares = {column: ensembl_share([name for name, _ in pairs]) for column, pairs in bare.items()}
    best = max(shares, key=lambda column: shares[column])
    names, species = [name for name, _ in bare[best]], [owner for _, owner in bare[best]]
    types = [GENE_EXPRESSION] * len(names) if kinds is None else list(kinds)
    _refuse_unknown_prefix(names, species, types, source)
    if genomes is not None:
        owners = _species_of_genomes(genomes, source)
        # Other feature types (antibodies) have no genome.
        species = [own if own is not None else owners[genome] for own, genome in zip(species, genomes, strict=True)]
    declared = source.species or "mouse"
    own_form = _ENSEMBL_SPECIES.get(declared)
    for i, (name, owner) in enumerate(zip(names, species, strict=True)):
        form = _ENSEMBL.match(name) if own_form is not None and owner is None else None
        foreign = form is not None and form[1].upper() != own_form and form[1].upper() in _ENSEMBL_SPECIES.values()
        if types[i] == GENE_EXPRESSION and (foreign or owner not in {None, declared}):
            types[i] = OTHER_SPECIES
    return Features(names, types if any(kind != GENE_EXPRESSION for kind in types) else None)


def _split(name: str, source: Source) -> tuple[str, str | None]:
    """(name without its genome prefix, species of the prefix or None)."""
    for prefix, species in source.genomes.items():
        if name.startswith(prefix) and name[len(prefix) :][:1] in {"_", "-", ":", "."}:
            return name[len(prefix) :].lstrip("_-:."), species
    if "_" in name:
        for species, pattern in _PREFIXED.items():
            match = pattern.match(name)
            if match:
                return name[match.end() :], species
    return name, None


def _refuse_unknown_prefix(
    names: Sequence[str], species: Sequence[str | None], kinds: Sequence[str], source: Source
) -> None:
    """Stop where many names share a prefix that may be a genome's: nobody knows whose genes these are."""
    genes = [i for i, kind in enumerate(kinds) if kind == GENE_EXPRESSION]
    # An Ensembl id says itself whose gene it is, whatever stands before it.
    matches = [_ANY_PREFIX.match(names[i]) for i in genes if species[i] is None and not _ENSEMBL.match(names[i])]
    found = Counter(match[1] for match in matches if match)
    any_known = any(species[i] is not None for i in genes)
    least = _UNRESOLVED_SHARE_BESIDE_KNOWN if any_known else _UNRESOLVED_SHARE
    for prefix, number in found.most_common(1):
        if number > 1 and number >= least * len(genes):
            raise UserError(
                f"{source.uri}: {number} of {len(genes)} gene names start with {prefix!r}, which is the name of no "
                f'known genome; say whose it is with `genomes = {{"{prefix}" = "mouse"}}`'
            )


def _species_of_genomes(genomes: Sequence[str], source: Source) -> dict[str, str | None]:
    """Species of each genome of a file. A single unknown one is taken for the declared species: mapping will tell."""
    found = {genome: species_of_assembly(genome, source) for genome in dict.fromkeys(genomes)}
    named = [genome for genome in found if genome]
    unknown = [genome for genome in named if found[genome] is None]
    if unknown and len(named) > 1:
        raise UserError(
            f"{source.uri}: the file has the genomes {', '.join(named)}, and {unknown[0]!r} is none that is known; say "
            f'whose it is with `genomes = {{"{unknown[0]}" = "mouse"}}`'
        )
    return found
