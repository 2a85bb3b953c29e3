"""The original programs' comparisons, where they differ from ours (docs/perturbation.md lists what differs).

Nothing here follows their code: the rules are those of a written description. What such a program edits is the same; it
differs in what it leaves out and in which rows of the unperturbed cell it compares with. `evaluate.scan_compute` knows
the rest: the similarity of "geneformer" is the mean over genes of the cosines of their own embeddings, and the shifts
of "geneformer_v2" pool the perturbed genes too.
"""

import dataclasses

import numpy as np

from evaluate.perturb import Edits
from evaluate.perturb_settings import Compat, PerturbationSettings


def as_published(
    edits: Edits, input_length: int, max_genes: int, settings: PerturbationSettings, compat: Compat
) -> tuple[Edits, dict[str, int]]:
    """Change the perturbations of one cell to what the original would have done and compared.

    Parameters
    ----------
    edits
        As planned.
    input_length
        Genes of the cell's input.
    max_genes
        Genes that fit into an input.

    Returns
    -------
    edits, skipped
        Rows that the original has, and the numbers of the others by reason: `top_gene` (not overexpressed where all
        genes are) and `nothing_left` (no row of the unperturbed cell to compare with).
    """
    if compat == "none":
        return edits, {}
    skipped = {}
    if settings.kind == "overexpress" and settings.lists_no_genes:
        at_top = edits.ranks[:, 0] == 0
        skipped["top_gene"] = int(at_top.sum())
        edits = edits.take(~at_top)
    absent = ((edits.genes >= 0) & (edits.ranks < 0)).sum(axis=1)
    if compat == "geneformer":
        # One row of the unperturbed cell goes for each gene of the set: its own, or the last one for an absent gene.
        end = _end_of_first(edits.removed, input_length - (edits.ranks >= 0).sum(axis=1) - absent)
    else:
        # The overflow is taken from the sequence that has grown already, so that it counts added genes twice.
        lengthened = np.minimum(input_length + absent, max_genes)
        end = input_length - np.maximum(lengthened + absent - max_genes, 0)
    left = end - (edits.removed < end[:, None]).sum(axis=1)
    skipped["nothing_left"] = int((left <= 0).sum())
    return dataclasses.replace(edits, pooled_end=end).take(left > 0), skipped


def _end_of_first(removed: np.ndarray, number: np.ndarray) -> np.ndarray:
    """int64[rows]: the place behind the first `number` genes that are not in `removed`."""
    shift = np.arange(removed.shape[1])
    return number + (removed - shift < number[:, None]).sum(axis=1)
