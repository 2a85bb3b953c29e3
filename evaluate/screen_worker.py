"""One worker of a first-order screen: turns work units into committed sums of guesses. No Ray."""

import io

import numpy as np
import polars as pl
import torch

from corpus.store import Store
from evaluate.scan_plan import WorkUnit
from evaluate.scan_worker import Job, ScanWorker
from evaluate.screen_compute import guess_deletions

GUESSES = "guesses/{}.parquet"
"""File of a unit."""


class ScreenWorker(ScanWorker):
    """See the module."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.scanner.encoder.requires_grad_(False)

    def guess(self, unit: WorkUnit, out_uri: str, centroids: np.ndarray, anchors: int) -> None:
        """Guess for all cells of a unit and write sums by gene, unless they are there already.

        Parameters
        ----------
        out_uri
            Folder of the screen.
        centroids
            float64[states, d].
        anchors
            See `guess_deletions`.
        """
        store, path = Store(out_uri), GUESSES.format(unit.unit_id)
        if store.exists(path):
            return
        scanner, genes = self.scanner, self.corpus.genes
        sums = np.zeros((genes.vocab_size, len(centroids)))
        counts = np.zeros(genes.vocab_size, dtype=np.int64)
        target = torch.from_numpy(centroids).to(scanner.device)
        cells = self._read(unit.cells).truncate(scanner.max_genes)
        for first, last in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
            tokens = cells.tokens[first:last].astype(np.int64)
            found = guess_deletions(
                scanner.encoder,
                torch.from_numpy(tokens).to(scanner.device),
                target,
                num_layers=scanner.num_layers,
                special_tokens=scanner.special_tokens,
                embedding=scanner.embedding,
                anchors=anchors,
            )
            sums[tokens] += found.cpu().numpy()
            counts[tokens] += 1
        seen = (counts[genes.tokens] > 0) & self.job.allowed[genes.tokens]
        of_states = {f"sum_{state}": sums[genes.tokens[seen], i] for i, state in enumerate(self.job.states)}
        frame = pl.DataFrame(
            {
                "ensembl_id": np.array(genes.ensembl_ids)[seen].tolist(),
                "symbol": np.array(genes.symbols)[seen].tolist(),
                "n_cells": counts[genes.tokens[seen]],
                **of_states,
            },
            schema_overrides={"ensembl_id": pl.String, "symbol": pl.String},
        )
        sink = io.BytesIO()
        frame.write_parquet(sink)
        store.create(path, sink.getvalue())
