"""The parser of text matrices against Python's own `float` and `csv`."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.readers import numbers
from ingest.readers.numbers import parse_lines

FIELDS = st.one_of(
    st.integers(-20, 200).map(str),
    st.integers(0, 10**18).map(str),
    st.floats(allow_nan=False).map(repr),
    st.sampled_from(
        ["0", "0", "0", "0.0", "3.", ".5", "00", "007", "1e3", "nan", "inf", " 4", "5 ", '"6"', "+7", "1_0"]
    ),
)
NAMES = st.one_of(st.sampled_from(["Sox2", "", '"a,b"', '"x\ty"', '"say ""b"""', "Gène", "0"]))


def parse(text: bytes, separator: str, width: int) -> tuple[list[str], np.ndarray]:
    names: list[str] = []
    entries: list[tuple[int, int, float]] = []
    for lines in parse_lines(io.BytesIO(text), separator, width, 1_000_000):
        entries += zip((lines.rows + len(names)).tolist(), lines.columns.tolist(), lines.values.tolist(), strict=True)
        names += lines.names
    dense = np.zeros((len(names), width))
    for row, column, value in entries:
        assert value != 0
        dense[row, column] = value
    return names, dense


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_the_numbers_of_csv_and_float(separator: str, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 5))
    rows = data.draw(st.lists(st.tuples(NAMES, st.lists(FIELDS, min_size=width, max_size=width)), max_size=12))
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    text = end.join(separator.join([name, *fields]) for name, fields in rows) + data.draw(st.sampled_from(["", end]))
    small = data.draw(st.sampled_from([1, 7, 50, 10_000]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "_CHUNK_BYTES", small)
        names, found = parse(text.encode(), separator, width)
    expected = list(csv.reader(io.StringIO(text), delimiter=separator)) if text.strip() else []
    assert names == [fields[0] for fields in expected]
    wanted = np.array([[float(field) for field in fields[1:]] for fields in expected]).reshape(-1, width)
    np.testing.assert_array_equal(found, wanted)


def test_blank_lines_are_passed_over() -> None:
    names, found = parse(b"\na 1\n\r\n\nb 2\n\n", " ", 1)
    assert (names, found.tolist()) == (["a", "b"], [[1.0], [2.0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,1,2\nb,1\n", r"line 2 of the numbers \('b'\) has 1 fields after the name, expected 2"),
        (b"a,1,2,3\n", r"line 1 of the numbers \('a'\) has 3 fields"),
        (b"a,1,2\nb,1,x\n", r"'x' in line 2 of the numbers \('b'\), field 2: no number"),
        (b"a,,2\n", "'' in line 1 .* field 1: no number"),
        (b"a,1,2\nb,1,2", None),
        (b"a,.,2\n", "no number"),
        (b"a,1.,2.50.1\n", "no number"),
        (b"a,0x1,2\n", "no number"),
    ],
)
def test_a_wrong_line_is_named(text: bytes, message: str | None) -> None:
    if message is None:
        assert parse(text, ",", 2)[0] == ["a", "b"]
        return
    with pytest.raises(ValueError, match=message):
        parse(text, ",", 2)


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "_CHUNK_BYTES", 100)
    with pytest.raises(ValueError, match="a line is longer than 1,000 bytes"):
        list(parse_lines(io.BytesIO(b"1," * 2_000), ",", 5, 1_000))
