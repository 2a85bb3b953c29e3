"""Cell labels as text, whatever their type in the source."""

from typing import Any

import pandas as pd


def as_labels(values: Any) -> list[str | None]:
    """Text of each value; None for a missing one.

    Numbers are written as Python writes them (a whole number stored as a float is `3.0`), truth values as `True` and
    `False`, bytes as UTF-8.
    """
    series = pd.Series(values)
    return [None if missing else _text(value) for value, missing in zip(series, series.isna(), strict=True)]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
