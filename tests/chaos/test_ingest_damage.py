"""Damaged copies of an h5ad file: a typed error or the same data, and never a dead driver (R6)."""

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from corpus.errors import UserError
from corpus.store import Store
from ingest.limits import Limits
from ingest.pipeline import prepare
from ingest.plan import Inspection, Names, cut
from ingest.sandbox import SourceDiedError, read_safely
from ingest.settings import IngestSettings, Source
from ingest.tasks import extract_unit, inspect_source
from tests.factories_ingest import toy_settings, write_toy

pytestmark = pytest.mark.chaos
LIMITS = Limits(reader_memory_gb=1.0, reader_minutes=0.5)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Set 1, 4 or 16 bytes at random places to random values; cut the end off one copy in five."""
    copy = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(0, len(copy), rng.choice([1, 4, 16]))
    copy[places] = rng.integers(0, 256, len(places))
    return copy[: rng.integers(1, len(copy))].tobytes() if rng.random() < 0.2 else copy.tobytes()


def read_all(source: Source, settings: IngestSettings, names: Names, out: Path) -> pl.DataFrame:
    """Read a source as a run does; the content of its cells files."""
    found = read_safely(LIMITS, source.uri, inspect_source, source, names)
    units = cut([Inspection.model_validate(found)], settings, names.hash)
    for unit in units:
        rules = settings.quality_control
        read_safely(LIMITS, source.uri, extract_unit, unit, Store(out), names, settings.extra_obs, rules)
    return pl.concat([pl.read_parquet(out / unit.cells) for unit in units])


def outcome_of(
    source: Source, settings: IngestSettings, names: Names, out: Path, expected: pl.DataFrame
) -> tuple[str, str]:
    """What happened, and what the error says; any error but the two typed ones goes through."""
    try:
        return ("identical" if read_all(source, settings, names, out).equals(expected) else "different"), ""
    except UserError as error:
        return "refused", str(error)
    except SourceDiedError as error:
        return "died", str(error)


def outcomes(folder: Path, number: int, expected_hash: bool) -> Counter[str]:
    """Read damaged copies and count what happened; anything but a typed error or an answer fails the test."""
    toy = write_toy(folder, "toy", num_cells=60)
    data, rng = toy.path.read_bytes(), np.random.default_rng(20_261_122)
    settings = toy_settings([toy], entries_per_unit=1_500)
    names, _ = prepare(settings)
    sound = settings.sources[0].model_copy(update={"dataset_id": "toy"})
    expected = read_all(sound, settings, names, folder / "sound")
    if expected_hash:
        sound = sound.model_copy(update={"sha256": Store(folder).sha256("toy.h5ad")})
        assert read_all(sound, settings, names, folder / "hashed").equals(expected)
    counted: Counter[str] = Counter()
    for number_of_copy in range(number):
        path = folder / f"damaged-{number_of_copy}.h5ad"
        path.write_bytes(damaged(data, rng))
        source = sound.model_copy(update={"uri": str(path)})
        outcome, text = outcome_of(source, settings, names, folder / f"out-{number_of_copy}", expected)
        assert not text or str(path) in text
        assert "\n" not in text
        counted[outcome] += 1
    assert counted.total() == number
    return counted


@pytest.mark.parametrize("number", [60, pytest.param(400, marks=[pytest.mark.nightly, pytest.mark.timeout(3_000)])])
def test_a_known_hash_refuses_every_changed_byte(tmp_path: Path, number: int) -> None:
    counted = outcomes(tmp_path, number, expected_hash=True)
    assert set(counted) <= {"refused", "identical"}  # identical: the random byte was the one that stood there
    assert counted["refused"] > 0.95 * number


@pytest.mark.parametrize("number", [60, pytest.param(400, marks=[pytest.mark.nightly, pytest.mark.timeout(3_000)])])
def test_without_a_hash_structure_is_checked_and_nothing_dies_but_readers(tmp_path: Path, number: int) -> None:
    """A changed count is a count: only a hash can tell. Errors are typed all the same, every copy is accounted for."""
    counted = outcomes(tmp_path, number, expected_hash=False)
    print(dict(counted))
    assert counted["refused"] > 0.3 * number
    assert counted["different"] < 0.2 * number
