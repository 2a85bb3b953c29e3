"""`evaluate map`: cells before and after a perturbation on one UMAP, and how far along the way to the goal they get.

A UMAP keeps neighbours and no distances, and a perturbation moves a cell much less than cells differ. So the same move
is shown a second time on a scale that means something: the line from the centroid of the start state (0) to that of the
goal state (1).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from corpus.errors import UserError
from corpus.provenance import record_run
from corpus.reader import Cells
from corpus.store import Store
from evaluate.drawing import to_png
from evaluate.embed import layout
from evaluate.map_commands import MapCommand
from evaluate.perturb import Edits, build_sequences
from evaluate.perturb_settings import EngineSettings, ScanSettings
from evaluate.plots_shifts import shift_map
from evaluate.scan_plan import WorkUnit
from evaluate.scan_setup import Scan
from evaluate.scan_worker import ScanWorker
from evaluate.shifts import MANIFEST, ScanManifest

_BATCH_CELLS = 256


@dataclass(frozen=True)
class Moved:
    """Cells of the start state and what a perturbation makes of them.

    Parameters
    ----------
    numbers
        int64[cells]: numbers in the corpus, ascending.
    before, after
        float64[cells, d]: embeddings of the whole inputs.
    """

    numbers: np.ndarray
    before: np.ndarray
    after: np.ndarray


def write_map(settings: MapCommand) -> str:
    """Write map.png and cells.csv; return a line that sums them up.

    Raises
    ------
    UserError
        If the scan has no states, was of another corpus or model, or the perturbation changes no cell.
    """
    store = Store(settings.shifts)
    manifest = ScanManifest.read(store)
    scan = open_scan(settings, manifest)
    worker = ScanWorker(scan.job)
    moved = move_cells(scan, worker, settings.max_cells)
    start, goal = manifest.states[:2]
    centroids, members = {}, {}
    for state, cells in scan.selection.state_cells.items():
        centroids[state] = worker.centroid(cells)
        members[state] = worker.scanner.embed(worker.corpus.read_cells(cells[: settings.max_state_cells]))
    points = np.concatenate([*members.values(), moved.before, moved.after])
    places = layout(points.astype(np.float32), settings.umap, settings.seed)
    cut = np.cumsum([len(part) for part in members.values()])
    *of_states, before, after = np.split(places, [*cut, cut[-1] + len(moved.before)])
    way = [along(side, centroids[start], centroids[goal]) for side in (moved.before, moved.after)]
    shift = cosine(moved.after, centroids[goal]) - cosine(moved.before, centroids[goal])
    table = scan.obs_of(moved.numbers).select("cell_id", "donor_id").with_columns(
        pl.Series(f"shift_{goal}", shift),
        pl.Series("moved_l2", np.linalg.norm(moved.after - moved.before, axis=1)),
        pl.Series("along_before", way[0]), pl.Series("along_after", way[1]),
        *(pl.Series(f"umap{axis + 1}_{name}", side[:, axis])
          for name, side in (("before", before), ("after", after)) for axis in (0, 1)),
    )  # fmt: skip
    what = f"{manifest.perturbation} {_named(scan)}"
    figure = shift_map(
        dict(zip(members, of_states, strict=True)), before, after, way[0], way[1], title=what, start=start, goal=goal
    )
    out = Store(settings.out)
    if not out.create("cells.csv", table.write_csv().encode()):
        raise UserError(f"{out.uri}: holds another map; choose another --out")
    out.create("map.png", to_png(figure))
    record_run(out, "evaluate map", settings, {"scan": manifest.scan_id, "manifest": store.sha256(MANIFEST)})
    closer = int((shift > 0).sum())
    return (
        f"map: {what} in {len(table):,} cells; {closer:,} move towards {goal}; median move "
        f"{np.median(way[1] - way[0]):+.2%} of the way from {start} to {goal}\n{out.uri}"
    )


def open_scan(settings: MapCommand, manifest: ScanManifest) -> Scan:
    """Make the scan ready again, for the one perturbation that is to be drawn.

    Raises
    ------
    UserError
        See `write_map`.
    """
    if not manifest.states:
        raise UserError(f"{settings.shifts}: a scan without states has no goal to move to")
    described = ScanSettings.model_validate(manifest.settings)
    change = described.perturbation
    if change.combine not in ("one_by_one", "joint"):
        raise UserError(f'{settings.shifts}: a scan with combine = "{change.combine}" has no one perturbation to draw')
    if settings.gene is not None:
        change = change.model_copy(update={"genes": [settings.gene], "combine": "one_by_one"})
    elif change.combine == "one_by_one":
        raise UserError("gene: name the gene to draw")
    asked = described.model_copy(
        update={"perturbation": change, "gene_shifts": None, "engine": EngineSettings(workers=0)}
    )
    scan = Scan(asked, settings.corpus, settings.model, settings.out)
    for name, found, expected in (
        ("model", scan.model.checksum, manifest.model_checksum),
        ("corpus", scan.corpus_sha256, manifest.corpus_sha256),
    ):
        if found != expected:
            raise UserError(f"{getattr(settings, name)}: not the {name} of the scan {settings.shifts} (hashes differ)")
    return scan


def move_cells(scan: Scan, worker: ScanWorker, max_cells: int) -> Moved:
    """Embed cells before and after the first perturbation that changes them.

    Raises
    ------
    UserError
        If there is no such cell.
    """
    numbers: list[np.ndarray] = []
    before, after = [], []
    left = max_cells
    # The scan's cells are ascending, and files lie by source: a few from everywhere come first.
    order = np.random.default_rng(scan.settings.cells.seed).permutation(scan.selection.cells)
    counts = scan.settings.perturbation.fold_change is not None
    for first in range(0, len(order), _BATCH_CELLS):
        chosen = np.sort(order[first : first + _BATCH_CELLS])
        cells = worker.corpus.read_cells(chosen, counts=counts)
        edits, _ = worker.edits(cells, WorkUnit("", chosen))
        changed = np.array([bool(len(edit)) and not edit.no_op[0] for edit in edits])
        rows = np.flatnonzero(changed)[:left]
        left -= len(rows)
        if len(rows):
            kept = cells.take(rows)
            numbers.append(chosen[rows])
            before.append(worker.scanner.embed(kept))
            after.append(worker.scanner.embed(edited(kept, [edits[row].take(slice(0, 1)) for row in rows])))
        if not left:
            break
    if not numbers:
        raise UserError(f"{_named(scan)}: the perturbation changes none of the {len(order):,} scanned cells")
    joined = np.concatenate(numbers)
    by_number = np.argsort(joined)
    return Moved(joined[by_number], np.concatenate(before)[by_number], np.concatenate(after)[by_number])


def edited(cells: Cells, edits: list[Edits]) -> Cells:
    """Build perturbed cells, without counts: one perturbation a cell."""
    joined = Edits.concatenate(edits)
    tokens, starts, input_lengths, removed, targets, inserted, lengths = (
        torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64))
        for part in (
            cells.tokens, cells.offsets[:-1], cells.lengths,
            joined.removed, joined.targets, joined.inserted, joined.lengths,
        )
    )  # fmt: skip
    sequences = build_sequences(
        tokens, starts, input_lengths, removed, targets, inserted, lengths, int(joined.lengths.sum())
    )
    return Cells(cells.index, sequences.offsets.numpy(), sequences.tokens.numpy().astype(cells.tokens.dtype))


def along(points: np.ndarray, start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Place of each point [cells, d] on the line from `start` (0) to `goal` (1), by orthogonal projection."""
    way = goal - start
    length = float(way @ way)
    if length == 0:
        return np.zeros(len(points))
    found: np.ndarray = (points - start) @ way / length
    return found


def cosine(points: np.ndarray, centroid: np.ndarray) -> np.ndarray:
    """Cosine of each point [cells, d] with a centroid."""
    found: np.ndarray = points @ centroid / (np.linalg.norm(points, axis=1) * np.linalg.norm(centroid))
    return found


def _named(scan: Scan) -> str:
    symbols = dict(zip(scan.corpus.genes.tokens.tolist(), scan.corpus.genes.symbols, strict=True))
    listed = [] if scan.job.listed is None else scan.job.listed.tolist()
    return "+".join(symbols[token] for token in listed)
