"""What a perturbation does to the ranked genes of a cell, as numbers: no model, no Ray, no files.

Every kind of perturbation takes a set of genes out of the ranking and puts some of them back elsewhere. `plan_edits`
says which places (numpy, one row a perturbation, up to k genes in its set); `build_sequences` turns such rows into the
token sequences of a batch by index arithmetic, on the device that the model runs on.
"""

from dataclasses import dataclass

import numpy as np
import torch

from evaluate.perturb_settings import PerturbationSettings

NONE = 1 << 40
"""Pads `removed` and `targets`: a place that no sequence reaches."""


@dataclass(frozen=True)
class Edits:
    """Perturbations, one row each, of sets of up to k genes.

    Parameters
    ----------
    genes
        int64[rows, k]: tokens of the set, in the order given; -1 pads.
    ranks
        int64[rows, k]: place of each of them in the model's input before; -1 if it is not in it (and for pads).
    removed
        int64[rows, k]: places taken out of the source sequence, ascending; `NONE` pads.
    targets
        int64[rows, k]: places of the genes put back, in the sequence after the edit, ascending; `NONE` pads.
    inserted
        int64[rows, k]: tokens put at `targets`; -1 pads.
    lengths
        int64[rows]: genes of the perturbed input.
    pooled_end
        int64[rows]: the genes that both inputs share, and that were not perturbed, are those at places below
        `pooled_end` of the original input that are not in `removed`.
    no_op
        bool[rows]: the perturbed input is the original one.
    """

    genes: np.ndarray
    ranks: np.ndarray
    removed: np.ndarray
    targets: np.ndarray
    inserted: np.ndarray
    lengths: np.ndarray
    pooled_end: np.ndarray
    no_op: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: np.ndarray | slice) -> "Edits":
        """Select rows."""
        return Edits(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @staticmethod
    def concatenate(parts: list["Edits"]) -> "Edits":
        """Join the rows of several cells; all with the same k."""
        return Edits(*(np.concatenate([getattr(p, name) for p in parts]) for name in Edits.__dataclass_fields__))


def null_edits(input_lengths: np.ndarray) -> list[Edits]:
    """One perturbation a cell that changes nothing, yet is run: what it measures is rounding."""
    none = np.full((1, 1), NONE)
    absent = np.full((1, 1), -1)
    return [
        Edits(absent, absent, none, none, absent, np.array([n]), np.array([n]), np.array([False]))
        for n in input_lengths.tolist()
    ]


def gene_sets(settings: PerturbationSettings, listed: np.ndarray | None, anchor: int | None) -> np.ndarray | None:
    """Lay out the sets of a gene list.

    Parameters
    ----------
    settings
        `combine` says how genes make sets.
    listed
        int64[genes], tokens without repeats; None for the genes of each cell.
    anchor
        Token of the anchor gene, if any.

    Returns
    -------
    int64[sets, k], -1 pads; None if the sets differ from cell to cell (`cell_sets`).
    """
    if listed is None:
        return None
    if settings.combine == "joint":
        return listed[None, :]
    if settings.combine == "one_by_one":
        return listed[:, None]
    if settings.combine == "pairs":
        first, second = np.triu_indices(len(listed), 1)
        return np.concatenate([_padded(listed), np.stack([listed[first], listed[second]], axis=1)])
    assert anchor is not None
    return _with_anchor(listed, anchor)


def cell_sets(
    settings: PerturbationSettings, tokens: np.ndarray, allowed: np.ndarray, anchor: int | None
) -> np.ndarray:
    """Lay out the sets of one cell where `genes = "all"`.

    Parameters
    ----------
    tokens
        int64[genes] of the cell's input.
    allowed
        bool[vocab_size]: genes that are scanned.
    """
    genes = tokens[allowed[tokens]]
    if settings.combine == "one_by_one":
        return genes[:, None]
    assert anchor is not None
    return _with_anchor(genes, anchor)


def _padded(genes: np.ndarray) -> np.ndarray:
    return np.stack([genes, np.full_like(genes, -1)], axis=1)


def _with_anchor(genes: np.ndarray, anchor: int) -> np.ndarray:
    others = genes[genes != anchor]
    pairs = np.stack([np.full_like(others, anchor), others], axis=1)
    return np.concatenate([[[anchor, -1]], _padded(others), pairs])


def plan_edits(
    tokens: np.ndarray,
    counts: np.ndarray | None,
    sets: np.ndarray,
    settings: PerturbationSettings,
    medians: np.ndarray,
    max_genes: int,
) -> tuple[Edits, dict[str, int]]:
    """Work out the perturbations of one cell.

    Parameters
    ----------
    tokens
        int64[genes], at least one, in rank order, not truncated.
    counts
        Raw counts in the same order; needed where `fold_change` is set.
    sets
        int64[sets, k]: tokens of each set, -1 pads.
    medians
        float64[vocab_size] by token.
    max_genes
        Genes that fit into the model's input.

    Returns
    -------
    edits, skipped
        A row for each set that applies, in the order of `sets`, and the numbers of those that do not, by reason:
        `absent` (see `require` and `absent` in the settings) and `nothing_left` (no gene to compare).
    """
    input_length = min(len(tokens), max_genes)
    source = tokens if settings.before_truncation else tokens[:input_length]
    place_of = np.full(len(medians), -1, dtype=np.int64)
    place_of[source] = np.arange(len(source))
    places = np.where(sets >= 0, place_of[sets], -1)
    applies = _applies(settings, sets, places, input_length)
    sets, places = sets[applies], places[applies]

    wanted = _wanted_places(settings, source, counts, sets, places, medians)
    removed = np.sort(np.where(places >= 0, places, NONE), axis=1)
    order = np.argsort(wanted, axis=1, kind="stable")
    targets = np.take_along_axis(wanted, order, axis=1)
    inserted = np.where(targets < NONE, np.take_along_axis(sets, order, axis=1), -1)
    num_kept = len(source) - (removed < NONE).sum(axis=1)
    num_inserted = (targets < NONE).sum(axis=1)
    targets = _spread(targets, num_kept + num_inserted, num_inserted)

    lengths = np.minimum(num_kept + num_inserted, max_genes)
    shared = lengths - (targets < lengths[:, None]).sum(axis=1)
    # The place just behind the last original gene that is still in the input.
    shift = np.arange(removed.shape[1])
    pooled_end = np.minimum(shared + (removed - shift < shared[:, None]).sum(axis=1), input_length)
    left = pooled_end - (removed < pooled_end[:, None]).sum(axis=1)
    # Unchanged if the same genes come back to the same places; what lies behind the input does not count.
    seen_targets = np.where(targets < lengths[:, None], targets, NONE)
    seen_removed = np.where(removed < input_length, removed, NONE)
    seen_inserted = np.where(seen_targets < NONE, inserted, -1)
    before = np.where(seen_removed < NONE, source[np.minimum(removed, input_length - 1)], -1)
    same = ((seen_targets == seen_removed) & (seen_inserted == before)).all(axis=1)
    edits = Edits(
        genes=sets,
        ranks=np.where(places < input_length, places, -1),
        removed=removed,
        targets=targets,
        inserted=inserted,
        lengths=lengths,
        pooled_end=pooled_end,
        no_op=same & (lengths == input_length),
    )
    skipped = {"absent": int((~applies).sum()), "nothing_left": int((left == 0).sum())}
    return edits.take(left > 0), skipped


def _applies(settings: PerturbationSettings, sets: np.ndarray, places: np.ndarray, input_length: int) -> np.ndarray:
    """bool[sets]: the cell has the genes that the perturbation needs, in its input."""
    in_input = (places >= 0) & (places < input_length)
    if settings.kind == "knock_in" or (settings.kind == "overexpress" and settings.absent == "insert"):
        return np.ones(len(sets), dtype=bool)
    if settings.kind == "delete" and settings.require == "any":
        return np.logical_or.reduce(in_input, axis=1)
    return np.logical_and.reduce(in_input | (sets < 0), axis=1)


def _wanted_places(
    settings: PerturbationSettings,
    source: np.ndarray,
    counts: np.ndarray | None,
    sets: np.ndarray,
    places: np.ndarray,
    medians: np.ndarray,
) -> np.ndarray:
    """int64[sets, k]: where each gene of a set should be after the edit, before collisions are settled."""
    real = sets >= 0
    if settings.kind == "delete":
        wanted = np.full_like(sets, NONE)
    elif settings.kind == "overexpress":
        wanted = np.broadcast_to(np.arange(sets.shape[1]), sets.shape)
    elif settings.kind == "knock_in":
        assert settings.rank is not None
        wanted = settings.rank + np.broadcast_to(np.arange(sets.shape[1]), sets.shape)
    elif settings.rank_shift is not None:
        step = settings.rank_shift if settings.kind == "knockdown" else -settings.rank_shift
        wanted = np.clip(places + step, 0, len(source) - 1)
    else:
        assert settings.fold_change is not None
        if counts is None:
            raise ValueError("fold_change needs the cells' counts")
        wanted = _ranked_again(source, counts[: len(source)], sets, places, medians, settings.fold_change)
    return np.where(real, wanted, NONE)


def _ranked_again(
    source: np.ndarray, counts: np.ndarray, sets: np.ndarray, places: np.ndarray, medians: np.ndarray, factor: float
) -> np.ndarray:
    """Places of the genes of each set once their counts were multiplied, by the rule of `corpus.rank`."""
    keys = -(counts / medians[source])
    real = sets >= 0
    new = np.where(real, -(counts[np.maximum(places, 0)] * factor / medians[np.maximum(sets, 0)]), np.inf)
    ahead = np.searchsorted(keys, new, side="left")
    last_tied = np.searchsorted(keys, new, side="right")
    for row, column in zip(*np.nonzero((last_tied > ahead) & real), strict=True):
        tied = source[ahead[row, column] : last_tied[row, column]]
        ahead[row, column] += np.searchsorted(tied, sets[row, column])
    # Those ahead that are themselves perturbed count by their new keys.
    member_ahead = (np.where(real, places, NONE)[:, None, :] < ahead[:, :, None]).sum(axis=2)
    first = (new[:, None, :] < new[:, :, None]) | (
        (new[:, None, :] == new[:, :, None]) & (sets[:, None, :] < sets[:, :, None])
    )
    return ahead - member_ahead + (first & real[:, None, :]).sum(axis=2)


def _spread(targets: np.ndarray, totals: np.ndarray, num_inserted: np.ndarray) -> np.ndarray:
    """Give genes that want the same place consecutive ones, none behind the end of the sequence."""
    targets = targets.copy()
    for column in range(1, targets.shape[1]):
        pushed = np.maximum(targets[:, column], targets[:, column - 1] + 1)
        targets[:, column] = np.where(targets[:, column] < NONE, pushed, NONE)
    highest = (totals - num_inserted)[:, None] + np.arange(targets.shape[1])
    return np.where(targets < NONE, np.minimum(targets, highest), NONE)


@dataclass(frozen=True)
class Sequences:
    """Perturbed inputs end to end, without special tokens.

    Parameters
    ----------
    tokens
        int64[T].
    offsets
        int64[rows + 1].
    positions
        int64[T]: place of each token in its sequence.
    row
        int64[T]: number of the sequence that a token belongs to.
    source
        int64[T]: place of a kept token in its original cell; means nothing at an inserted one.
    pooled
        bool[T]: an unperturbed gene that the original input has too.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    positions: torch.Tensor
    row: torch.Tensor
    source: torch.Tensor
    pooled: torch.Tensor


def build_sequences(
    cell_tokens: torch.Tensor,
    starts: torch.Tensor,
    input_lengths: torch.Tensor,
    removed: torch.Tensor,
    targets: torch.Tensor,
    inserted: torch.Tensor,
    lengths: torch.Tensor,
    total: int,
) -> Sequences:
    """Build perturbed sequences on the device of the arguments.

    Without its inserted genes, place j of a perturbed sequence shows place j + #{i: removed[i] - i <= j} of the
    original: for one deleted gene at p that is j + (j >= p).

    Parameters
    ----------
    cell_tokens
        int64[entries]: whole cells end to end.
    starts, input_lengths
        int64[rows]: where each row's cell starts in `cell_tokens`, and how many genes its original input has.
    removed, targets, inserted, lengths
        As in `Edits`, int64.
    total
        Sum of `lengths`, known on the host.
    """
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    positions = torch.arange(total, device=lengths.device) - offsets[row]
    slot = torch.arange(removed.shape[1], device=removed.device)
    new = targets[row] == positions[:, None]
    kept = positions - (targets[row] < positions[:, None]).sum(1)
    source = kept + ((removed - slot)[row] <= kept[:, None]).sum(1)
    is_new = new.any(1)
    # Where a gene was inserted `source` means nothing and may point behind the cell.
    token = cell_tokens[torch.where(is_new, starts[row], starts[row] + source)]
    tokens = torch.where(is_new, (inserted[row] * new).sum(1), token)
    return Sequences(tokens, offsets, positions, row, source, ~is_new & (source < input_lengths[row]))
