"""How small an effect can be before it is rounding: measured on the scan's own model, cells and device."""

import copy

import numpy as np
import torch

from corpus.manifest import Record
from corpus.reader import Cells
from evaluate.perturb import Edits, null_edits
from evaluate.scan_compute import Measured, Scanner

NOISE_CELLS = 16
"""Cells that a scan's noise is measured on."""

_PER_CELL = 4
_MAX_TOKENS = 65_536
_RESOLUTION = float(np.finfo(np.float32).epsneg)


class NoiseFloor(Record):
    """Effects of one perturbation in one cell that are not larger than these are rounding.

    `shift`, `similarity` and `probability` are the largest of three numbers each:

    error
        Largest difference between a read-out of the scan and the same computed in double precision, over a sample of
        the scan's own perturbations.
    null
        Largest read-out of a perturbation that changes nothing, yet is run in a batch of its own.
    resolution
        Spacing of single-precision numbers just below 1, 6.0e-8. The weights and states of the model are single
        precision numbers; a cosine between them is not defined any finer, however small its measured error is (where
        all cells have one embedding, errors cancel almost wholly).

    Parameters
    ----------
    shift
        Of a change of a cosine to a centroid.
    similarity
        Of 1 minus the similarity to the unperturbed cell.
    probability
        Of a change of a class's probability; 0 where it is not read out.
    error_shift, error_similarity, null_shift, null_similarity, resolution
        What they come from.
    cells, perturbations
        Size of the sample.
    precision
        Of the encoder in the scan.
    device
        Where it was measured: "cpu" or the name of the GPU.
    """

    shift: float
    similarity: float
    probability: float
    error_shift: float
    error_similarity: float
    null_shift: float
    null_similarity: float
    resolution: float
    cells: int
    perturbations: int
    precision: str
    device: str


def measure_noise(scanner: Scanner, cells: Cells, edits: list[Edits], centroids: np.ndarray) -> NoiseFloor:
    """Compare with double precision, and run what changes nothing.

    Parameters
    ----------
    cells
        At least one; the first are used whose perturbations do not hold too many tokens.
    edits
        One entry a cell: all its perturbations, from which a few are taken at even distances.
    centroids
        float64[states, d].
    """
    sample = [edit.take(_evenly(np.flatnonzero(~edit.no_op), _PER_CELL)) for edit in edits]
    cost = np.cumsum([int(edit.lengths.sum()) for edit in sample])
    kept = np.arange(len(cells))[: max(int(np.searchsorted(cost, _MAX_TOKENS, side="right")), 1)]
    cells, sample = cells.take(kept), [sample[cell] for cell in kept]
    found = scanner.scan(cells, sample, centroids)
    exact = in_double(scanner).scan(cells, sample, centroids)
    null = scanner.scan(cells, null_edits(np.minimum(cells.lengths, scanner.max_genes)), centroids)
    error = Measured(
        found.similarity - exact.similarity,
        found.shifts - exact.shifts,
        found.probabilities - exact.probabilities,
        found.gene_effects,
    )
    error_shift, error_similarity = _largest(error.shifts), _largest(error.similarity)
    null_shift, null_similarity = _largest(null.shifts), _largest(1 - null.similarity)
    probability = max(_largest(error.probabilities), _largest(null.probabilities))
    return NoiseFloor(
        shift=max(error_shift, null_shift, _RESOLUTION),
        similarity=max(error_similarity, null_similarity, _RESOLUTION),
        probability=max(probability, _RESOLUTION) if scanner.num_classes else 0.0,
        error_shift=error_shift,
        error_similarity=error_similarity,
        null_shift=null_shift,
        null_similarity=null_similarity,
        resolution=_RESOLUTION,
        cells=len(cells),
        perturbations=len(found.similarity),
        precision=scanner.precision,
        device=torch.cuda.get_device_name(scanner.device) if scanner.device.type == "cuda" else scanner.device.type,
    )


def in_double(scanner: Scanner) -> Scanner:
    """Copy a scanner; the copy runs everything in double precision, and reads no genes' own effects."""
    classifier = None if scanner.classifier is None else copy.deepcopy(scanner.classifier).double()
    return Scanner(
        copy.deepcopy(scanner.encoder).double() if classifier is None else classifier.bert,
        max_length=scanner.max_length,
        special_tokens=scanner.special_tokens,
        num_layers=scanner.num_layers,
        embedding=scanner.embedding,
        classifier=classifier,
        compat=scanner.compat,
        token_budget=scanner.token_budget,
        device=scanner.device,
    )


def _evenly(rows: np.ndarray, number: int) -> np.ndarray:
    return rows[np.unique(np.linspace(0, len(rows) - 1, number).astype(int))] if len(rows) else rows


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max()) if values.size else 0.0
