"""Garbage collection: remove what no manifest names, once it is old enough not to belong to a running run."""

import time
from collections.abc import Iterator
from datetime import timedelta

from corpus.errors import UserError
from corpus.manifest import Manifest
from corpus.store import Store

_FOLDERS = ("cells", "shards", "units", "genes", "reports")


def named_files(store: Store) -> set[str]:
    """Every file that a manifest of the corpus names, old manifests included.

    Raises
    ------
    UserError
        If there is no manifest: then every file may belong to a first run that is still going on.
    """
    numbers = Manifest.numbers(store)
    if not numbers:
        raise UserError(f"{store.uri}: no corpus here; nothing can be told apart from a run in progress")
    named: set[str] = set()
    for number in numbers:
        manifest = Manifest.read(store, number)
        named |= {manifest.genes, manifest.report}
        named |= {path for unit in manifest.units for path in (unit.shard, unit.record)}
    return named


def collect(store: Store, older_than: timedelta, *, dry_run: bool = False) -> Iterator[str]:
    """Remove what no manifest names and nobody has touched lately; what killed writers left half done, too.

    Parameters
    ----------
    older_than
        Least age. Younger files may belong to a run that is going on.
    dry_run
        Only say what would be removed.

    Yields
    ------
    The name of each file, once it is removed.

    Raises
    ------
    UserError
        If there is no manifest.
    """
    named, limit = named_files(store), time.time() - older_than.total_seconds()
    for path in list(store.walk()):
        if path.partition("/")[0] in _FOLDERS and path not in named and store.modified(path) < limit:
            if not dry_run:
                store.remove(path)
            yield path
    for name, started in list(store.unfinished()):
        if started < limit:
            if not dry_run:
                store.discard(name)
            yield name
