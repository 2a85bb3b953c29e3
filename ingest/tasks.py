"""What a reader process does with a source: the functions that touch source files, and are therefore run apart."""

from collections.abc import Sequence
from typing import Any

from corpus.store import Store
from ingest import stages
from ingest.plan import Names, WorkUnit, inspect
from ingest.settings import QualityControl, Source


def inspect_source(source: Source, names: Names) -> dict[str, Any]:
    """Look at a source; an `Inspection` as JSON values."""
    return inspect(source, names.mapper(), names.settings).model_dump(mode="json")


def extract_unit(
    unit: WorkUnit, store: Store, names: Names, extra_obs: Sequence[str], rules: QualityControl
) -> dict[str, Any]:
    """Read a unit and create its cells file."""
    stages.extract(unit, store, names.genes, names.mapper(), extra_obs, rules)
    return {}
