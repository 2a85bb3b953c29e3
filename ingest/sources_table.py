"""A table of sources (CSV) beside or instead of `[[sources]]` in TOML."""

import csv
import io
from typing import Any

from pydantic import ValidationError

from corpus.errors import UserError
from corpus.schema import obs_names
from corpus.store import split_uri
from ingest.settings import IngestSettings, Source

_GROUPS = {name for name, field in Source.model_fields.items() if "dict" in str(field.annotation)}
_SEVERAL = ";"


def all_sources(settings: IngestSettings) -> list[Source]:
    """Sources of the settings, then those of their table.

    Raises
    ------
    UserError
        If there are none, the table is wrong, or a source has a label that the corpus would not carry.
    """
    table = [] if settings.sources_table is None else read_sources(settings.sources_table)
    if not settings.sources and not table:
        raise UserError("no sources: give [[sources]] in the TOML file or a sources_table")
    sources = [*settings.sources, *table]
    carried = obs_names(settings.extra_obs)
    for source in sources:
        lost = [name for name in (*source.labels, *source.obs) if name not in carried]
        if lost:
            raise UserError(f"{source.uri}: the label {lost[0]!r} would be lost: name it in extra_obs")
    return sources


def read_sources(uri: str) -> list[Source]:
    """Read a table: one source a row, a column for each setting of `Source` that is needed, empty cells for defaults.

    Settings that hold several values have a column for each: `labels.tissue`, `obs.cell_type`, `genomes.refA`. The
    values of `obs_filters.<column>` are separated by semicolons. A `uri` is relative to the working folder, as in TOML.

    Raises
    ------
    UserError
        If it is no such table; the message names the row and the column.
    """
    store, name = split_uri(uri)
    try:
        text = store.read_bytes(name).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{uri}: not a CSV table: {error}") from error
    return [_source(row, f"{uri}: row {number}") for number, row in enumerate(rows, start=2)]


def _source(row: dict[Any, Any], where: str) -> Source:
    given: dict[str, Any] = {}
    for column, value in row.items():
        if column is None or value is None:
            raise UserError(f"{where}: it has {'more' if column is None else 'fewer'} fields than the header")
        if not value.strip():
            continue
        name, dot, key = column.strip().partition(".")
        if name not in Source.model_fields or (name in _GROUPS) != bool(dot):
            hint = f"expected {name}.<name>" if name in _GROUPS else "unknown column"
            raise UserError(f"{where}: column {column!r}: {hint}; known are {', '.join(Source.model_fields)}")
        if not dot:
            given[name] = value.strip()
        elif name == "obs_filters":
            given.setdefault(name, {})[key] = [part.strip() for part in value.split(_SEVERAL)]
        else:
            given.setdefault(name, {})[key] = value.strip()
    try:
        return Source.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
