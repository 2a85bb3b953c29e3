"""Reading what other commands wrote, for the report. A named file that is missing or broken is the user's to know."""

import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from corpus.errors import UserError
from corpus.store import Store


def read_json(store: Store, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    UserError
        If the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(store.read_bytes(name))
    except ValueError as error:
        raise UserError(f"{store.uri}/{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{store.uri}/{name}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_lines(store: Store, name: str) -> list[dict[str, Any]]:
    """Read one JSON object a line; a last line that a killed process left unfinished is passed over.

    Raises
    ------
    UserError
        If the file is missing, or any other line is not a JSON object.
    """
    lines = store.read_bytes(name).decode(errors="replace").split("\n")
    out = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{store.uri}/{name}: line {number} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{store.uri}/{name}: line {number}: expected a JSON object")
        out.append(value)
    return out


def read_table(store: Store, name: str, columns: Iterable[str]) -> pl.DataFrame:
    """Read a Parquet table.

    Raises
    ------
    UserError
        If the file is missing, is not Parquet, or lacks one of the columns.
    """
    try:
        table = pl.read_parquet(io.BytesIO(store.read_bytes(name)))
    except (PolarsError, OSError) as error:
        raise UserError(f"{store.uri}/{name}: not a Parquet table: {str(error).splitlines()[0]}") from error
    lacking = [column for column in columns if column not in table.columns]
    if lacking:
        raise UserError(f"{store.uri}/{name}: no column {', '.join(lacking)}; it has {', '.join(table.columns)}")
    return table


def series(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one measure of a metrics.jsonl; float64 each."""
    found = [
        (record["step"], record[name])
        for record in records
        if record.get(name) is not None and record.get("step") is not None
    ]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def run_records(store: Store, out: str | None = None) -> list[dict[str, Any]]:
    """Descriptions of the runs that wrote into a folder, oldest first; with `out`, of those that wrote this file."""
    names = [name for name in store.names("runs") if name.endswith(".json")]
    records = [read_json(store, f"runs/{name}") for name in names]
    if out is not None:
        records = [record for record in records if Store(str(record.get("settings", {}).get("out", ""))).uri == out]
    return records
