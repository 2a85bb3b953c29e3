"""Parsing lines of a name and many small numbers: most fields of a text matrix are the digit zero.

A table of a whole atlas has 10^10 fields; general CSV readers spend most of their time on columns of one value each.
Here whole numbers (`3`, `3.0`) are read by compiled code that keeps what is not zero, and every other field goes
to Python's own `float`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numba
import numpy as np

_CHUNK_BYTES = 4_000_000
_TAB, _NEWLINE, _RETURN, _QUOTE, _DOT, _ZERO, _NINE = (ord(sign) for sign in '\t\n\r".09')
_MAX_DIGITS = 15  # whole numbers below 10^15 are exact as float64


@dataclass(frozen=True)
class Lines:
    """Some lines of a table.

    Parameters
    ----------
    names
        First field of each line, without quotes.
    rows, columns, values
        Entries that are not zero: line within these, field after the name, float64 value.
    """

    names: list[str]
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


def parse_lines(stream: BinaryIO, separator: str, width: int, max_line_bytes: int) -> Iterator[Lines]:
    """Read what is left of a stream, a few megabytes at a time.

    Parameters
    ----------
    separator
        One ASCII character.
    width
        Number of fields after the name, the same in every line. Blank lines are passed over.

    Raises
    ------
    ValueError
        If a line has another number of fields or is too long, or a field is no number; the message says in which line.
    """
    rest, done = b"", 0
    while True:
        chunk = stream.read(_CHUNK_BYTES)
        text = rest + (chunk or b"\n")  # the last line may lack its end
        end = text.rfind(b"\n") + 1
        rest = text[end:]
        if len(rest) > max_line_bytes:
            raise ValueError(f"a line is longer than {max_line_bytes:,} bytes")
        if end:
            lines = _parse(text[:end], separator, width, done)
            done += len(lines.names)
            if lines.names:
                yield lines
        if not chunk:
            return


def _parse(text: bytes, separator: str, width: int, done: int) -> Lines:
    data = np.frombuffer(text, np.uint8)
    most = len(data) // 2 + 1
    rows, columns, values = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most)
    named = np.empty((int(np.count_nonzero(data == _NEWLINE)), 2), np.int64)
    odd = np.empty((most, 2), np.int64)
    found = _scan(data, ord(separator), width, named, rows, columns, values, odd)
    num_lines, num_entries, num_odd, wrong = found
    names = [_unquoted(text[start:stop]) for start, stop in named[:num_lines].tolist()]
    if wrong >= 0:
        where = f"line {done + num_lines} of the numbers ({names[-1]!r})" if names else "the first line of numbers"
        raise ValueError(f"{where} has {wrong} fields after the name, expected {width}")
    for entry, (start, stop) in zip(*_odd_entries(values, odd, num_entries, num_odd), strict=True):
        field = _unquoted(text[start:stop])
        try:
            values[entry] = float(field)
        except ValueError:
            line, column = done + int(rows[entry]) + 1, int(columns[entry]) + 1
            name = names[int(rows[entry])]
            raise ValueError(f"{field!r} in line {line} of the numbers ({name!r}), field {column}: no number") from None
    kept = np.flatnonzero(values[:num_entries])
    return Lines(names, rows[kept], columns[kept], values[kept])


def _odd_entries(
    values: np.ndarray, odd: np.ndarray, num_entries: int, num_odd: int
) -> tuple[list[int], list[list[int]]]:
    """Entries left to Python (they hold NaN until then), and the bytes of each."""
    return np.flatnonzero(np.isnan(values[:num_entries])).tolist(), odd[:num_odd].tolist()


def _unquoted(field: bytes) -> str:
    text = field.decode("utf-8").strip()
    return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


@numba.njit(cache=True, nogil=True)
def _scan(text, separator, width, named, rows, columns, values, odd):  # type: ignore[no-untyped-def]
    """Go through whole lines; the last byte is a line end.

    Returns (lines, entries, entries left to Python, number of fields of a line that has not `width`, or -1).
    """
    at, size = 0, len(text)
    line, entry, num_odd = 0, 0, 0
    while at < size:
        start = at
        at = _skip_field(text, at, separator)
        if text[at] == _NEWLINE and (at == start or (at == start + 1 and text[start] == _RETURN)):
            at += 1
            continue
        named[line, 0], named[line, 1] = start, at
        column = 0
        while text[at] == separator:
            at += 1
            start, value = at, 0
            while _ZERO <= text[at] <= _NINE:
                if at - start < _MAX_DIGITS:
                    value = 10 * value + (text[at] - _ZERO)
                at += 1
            plain = 0 < at - start <= _MAX_DIGITS
            if text[at] == _DOT:
                at += 1
                while text[at] == _ZERO:
                    at += 1
            if text[at] == _RETURN and text[at + 1] == _NEWLINE:
                at += 1
            plain = plain and (text[at] == separator or text[at] == _NEWLINE)
            if not plain:
                at = _skip_field(text, start, separator)
                odd[num_odd, 0], odd[num_odd, 1] = start, at
                num_odd += 1
            if column < width and (value != 0 or not plain):
                rows[entry], columns[entry] = line, column
                values[entry] = value if plain else np.nan
                entry += 1
            column += 1
        line += 1
        at += 1
        if column != width:
            return line, entry, num_odd, column
    return line, entry, num_odd, -1


@numba.njit(cache=True, nogil=True)
def _skip_field(text, at, separator):  # type: ignore[no-untyped-def]
    """End of the field that starts here: the next separator or line end outside quotes."""
    if text[at] == _QUOTE:
        at += 1
        while at < len(text) - 1 and text[at] != _QUOTE and text[at] != _NEWLINE:
            at += 1
    while text[at] != separator and text[at] != _NEWLINE:
        at += 1
    return at
