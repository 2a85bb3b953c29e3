"""Garbage collection: remove what no manifest names, once it is old enough not to belong to a running run."""

import time
from datetime import timedelta

from corpus.errors import UserError
from corpus.manifest import Manifest
from corpus.store import Store

_FOLDERS = ("cells", "shards", "units", "genes")


def unnamed(store: Store, older_than: timedelta) -> list[str]:
    """Files of a corpus that none of its manifests names and that are older than a limit, sorted.

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
        named |= {manifest.genes, *(unit.shard for unit in manifest.units), *(unit.record for unit in manifest.units)}
    limit = time.time() - older_than.total_seconds()
    return [
        path
        for path in store.walk()
        if path.partition("/")[0] in _FOLDERS and path not in named and store.modified(path) < limit
    ]
