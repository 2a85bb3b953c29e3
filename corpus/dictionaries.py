"""Published vocabularies: a token and a median dictionary become a gene table that keeps its own token ids.

Two forms are read: a Parquet table (`ensembl_id, token, median`, optionally `symbol`), and the pair of pickled Python
dictionaries that Geneformer and its relatives publish (Ensembl id -> token, Ensembl id -> median).

A pickle is a program. Here every instruction must be one of the few that build dictionaries, texts and numbers, and
the only things it can call are our own readers of NumPy scalars: nothing that the file names is ever imported.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from corpus.errors import UserError
from corpus.genes import GENES_SCHEMA, GeneTable
from corpus.schema import SPECIAL_TOKENS

_MAX_PICKLE_BYTES = 100_000_000
_SCALARS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8"}
# fmt: off
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
    "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}
# fmt: on


class _Type:
    """What stands in a pickle for a NumPy dtype: a name and a byte order, and no NumPy."""

    def __init__(self, name: object, *_: object) -> None:
        if name not in _SCALARS:
            raise pickle.UnpicklingError(f"values of type {name!r}")
        self.name, self.order = str(name), "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in {"<", ">", "|", "="}:
            self.order = str(state[1])


def _scalar(kind: object, data: object = None) -> int | float:
    """Value of a pickled NumPy scalar; before protocol 3 its bytes come as text."""
    if isinstance(data, str):
        data = data.encode("latin-1")
    if not isinstance(kind, _Type) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("an array scalar without type or bytes")
    dtype = np.dtype(kind.order.replace("|", "=") + kind.name)
    if len(data) != dtype.itemsize:
        raise pickle.UnpicklingError(f"{len(data)} bytes for a {kind.name}")
    value: int | float = np.frombuffer(data, dtype)[0].item()
    return value


def _encode(text: object, encoding: object) -> bytes:
    """How protocols below 3 spell bytes: `_codecs.encode(text, "latin1")`."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("an encoding other than latin1")
    return text.encode("latin-1")


class _Reader:
    """A function that a pickle may call, and not alter."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it alters what it calls")


_READERS = {
    ("numpy", "dtype"): _Reader(_Type),
    ("numpy.core.multiarray", "scalar"): _Reader(_scalar),
    ("numpy._core.multiarray", "scalar"): _Reader(_scalar),
    ("_codecs", "encode"): _Reader(_encode),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Reader:
        """Give our own reader for the name; refuse all others."""
        if (module, name) not in _READERS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _READERS[module, name]


def read_pickled_dictionary(path: Path) -> dict[str, int | float]:
    """Read a pickled dictionary of texts to numbers, running nothing that the file brings.

    Raises
    ------
    UserError
        If the file is missing, too large, or holds anything but a dictionary of texts to numbers.
    """
    try:
        if path.stat().st_size > _MAX_PICKLE_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for a dictionary of genes")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read this dictionary: {error}") from error
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise pickle.UnpicklingError(f"instruction {opcode.name}")
            # A memo slot far beyond the file would make the unpickler allocate up to 64 GB.
            if opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"} and int(argument or 0) > len(data):
                raise pickle.UnpicklingError(f"memo slot {argument}")
        found = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle may raise anything, and all of it means the same
        raise UserError(f"{path}: not a harmless pickled dictionary of genes to numbers: {error}") from error
    return _checked(found, path)


def _checked(found: Any, path: Path) -> dict[str, int | float]:
    if not isinstance(found, dict):
        raise UserError(f"{path}: it holds a {type(found).__name__}, not a dictionary")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{path}: entry {key!r}: {value!r} is not a number under a gene's name")
    return found


@dataclass(frozen=True)
class Dictionary:
    """A published vocabulary as found.

    Parameters
    ----------
    origin
        Names it in messages.
    tokens
        Name to token: genes and special tokens.
    medians
        Gene to non-zero median.
    symbols
        Gene to symbol, where the dictionary says.
    """

    origin: str
    tokens: Mapping[str, int]
    medians: Mapping[str, float]
    symbols: Mapping[str, str]


def read_dictionary(tokens: Path, medians: Path | None = None) -> Dictionary:
    """Read a vocabulary from a Parquet table, or from a pickled token dictionary and its pickled medians.

    Raises
    ------
    UserError
        If a file is missing or of another form.
    """
    if tokens.suffix == ".parquet":
        if medians is not None:
            raise UserError(f"{medians}: the Parquet dictionary {tokens} has its own medians; give one of the two")
        return _read_parquet(tokens)
    if medians is None:
        raise UserError(f"{tokens}: a pickled dictionary needs its medians too: set vocabulary.dictionary_medians")
    numbers = read_pickled_dictionary(tokens)
    for name, token in numbers.items():
        if not isinstance(token, int):
            raise UserError(f"{tokens}: token of {name!r} is {token!r}, not a whole number; are the two files swapped?")
    found = {name: int(token) for name, token in numbers.items()}
    values = {name: float(value) for name, value in read_pickled_dictionary(medians).items()}
    return Dictionary(str(tokens), found, values, {})


def _read_parquet(path: Path) -> Dictionary:
    try:
        table = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: cannot read this dictionary: {error}") from error
    for name, fits, expected in (
        ("ensembl_id", table.schema.get("ensembl_id") == pl.String, "texts"),
        ("token", table.schema.get("token", pl.Null()).is_integer(), "whole numbers"),
        ("median", table.schema.get("median", pl.Null()).is_numeric(), "numbers"),
    ):
        if not fits:
            raise UserError(f"{path}: column {name} is {table.schema.get(name, 'missing')}; expected {expected}")
    for name in ("ensembl_id", "token"):
        if table[name].null_count():
            raise UserError(f"{path}: column {name} has an empty row ({int(table[name].is_null().arg_max() or 0)})")
    repeated = table.filter(table["ensembl_id"].is_duplicated())["ensembl_id"]
    if len(repeated):
        raise UserError(f"{path}: {repeated[0]!r} has more than one row")
    genes = table.filter(pl.col("median").is_not_null())
    symbols = table.drop_nulls("symbol") if "symbol" in table.columns else table.clear()
    return Dictionary(
        str(path),
        dict(zip(table["ensembl_id"], table["token"], strict=True)),
        dict(zip(genes["ensembl_id"], genes["median"].cast(pl.Float64), strict=True)),
        dict(zip(symbols["ensembl_id"], symbols["symbol"], strict=True)) if len(symbols) else {},
    )


@dataclass(frozen=True)
class Imported:
    """A gene table from a dictionary, and what of the dictionary is not in it.

    Parameters
    ----------
    without_median, without_token
        Ensembl ids that only one of the two dictionaries has, in order: these genes are not ranked.
    """

    genes: GeneTable
    without_median: list[str]
    without_token: list[str]


def import_dictionary(dictionary: Dictionary, species: pl.DataFrame) -> Imported:
    """Make the gene table of a published vocabulary: the genes that have both a token and a median.

    Parameters
    ----------
    species
        Gene table of the species: symbols and biotypes that the dictionary does not give.

    Raises
    ------
    UserError
        If two names share a token, a special token is not where the models here expect it (`<pad>` 0, `<mask>` 1, and
        `<cls>` 2 and `<eos>` 3 where they exist), a token does not fit 16 bits, a median is not a positive number, or
        the dictionary is of another species.
    """
    where = dictionary.origin
    owner: dict[int, str] = {}
    for name, token in dictionary.tokens.items():
        if token in owner:
            raise UserError(f"{where}: {owner[token]} and {name} have the same token {token}")
        if not 0 <= token <= np.iinfo(np.uint16).max:
            raise UserError(f"{where}: token {token} of {name} does not fit 16 bits")
        owner[token] = name
    for place, name in enumerate(SPECIAL_TOKENS):
        if dictionary.tokens.get(name, place) != place:
            raise UserError(f"{where}: {name} has token {dictionary.tokens[name]}; only {place} is supported")
    special = {name for name in dictionary.tokens if name.startswith("<") and name.endswith(">")}
    unknown = sorted(special - set(SPECIAL_TOKENS))
    if unknown:
        raise UserError(f"{where}: unknown special token {unknown[0]}")
    with_token = set(dictionary.tokens) - special
    with_median = set(dictionary.medians) - special
    names = sorted(with_token & with_median, key=lambda name: dictionary.tokens[name])
    known = species.filter(pl.col("ensembl_id").is_in(names))
    if len(known) * 2 < len(names):
        raise UserError(
            f"{where}: only {len(known):,} of its {len(names):,} genes are genes of this species; check mapping.species"
        )
    symbol_of = dict(zip(known["ensembl_id"], known["symbol"], strict=True)) | dict(dictionary.symbols)
    biotype_of = dict(zip(known["ensembl_id"], known["biotype"], strict=True))
    columns = [
        [dictionary.tokens[name] for name in names],
        names,
        [symbol_of.get(name) for name in names],
        [biotype_of.get(name) for name in names],
        [dictionary.medians[name] for name in names],
        [0] * len(names),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, GENES_SCHEMA, strict=True)]
    try:
        genes = GeneTable(pa.table(arrays, schema=GENES_SCHEMA))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Imported(genes, sorted(with_token - with_median), sorted(with_median - with_token))
