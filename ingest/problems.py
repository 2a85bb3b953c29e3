"""Sources that cannot be used: collected over a run, and then either the end of it or set aside by name."""

import logging

from corpus.errors import RunError, UserError
from ingest.sandbox import SourceDiedError

logger = logging.getLogger(__name__)
_SHOWN = 5


class Problems:
    """What is wrong with which dataset.

    Parameters
    ----------
    allow_quarantine
        Whether the run goes on without such datasets. Nothing is dropped silently: they are logged here, and named in
        the report and in the manifest.
    """

    def __init__(self, allow_quarantine: bool = False) -> None:
        self.allow_quarantine = allow_quarantine
        self.quarantined: dict[str, str] = {}
        self._died = False
        self._traces: list[str] = []

    def add(self, dataset_id: str, error: UserError | SourceDiedError) -> None:
        """Note the first problem of a dataset."""
        if dataset_id in self.quarantined:
            return
        self.quarantined[dataset_id] = str(error)
        self._died |= isinstance(error, SourceDiedError)
        self._traces += getattr(error, "__notes__", [])

    def settle(self, left: int) -> None:
        """Go on, or end the run, once a stage has been through all sources.

        Parameters
        ----------
        left
            Datasets that can be used.

        Raises
        ------
        UserError
            If a source is bad input, and quarantine is not allowed or nothing else is left.
        RunError
            The same, if one of the sources made its reader die.
        """
        if not self.quarantined:
            return
        texts = list(self.quarantined.values())
        if self.allow_quarantine and left:
            for text in texts:
                logger.warning("quarantined: %s", text)
            return
        more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        hint = " (--allow-quarantine goes on without)" if left and not self.allow_quarantine else ""
        error = (RunError if self._died else UserError)("; ".join(texts[:_SHOWN]) + more + hint)
        for trace in self._traces[:_SHOWN]:
            error.add_note(trace)
        raise error
