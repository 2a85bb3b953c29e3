"""The screen: guesses for all genes, then exact deletions of some, and how well the two agree.

OUT/guesses/<unit>.parquet   sums over the cells of a work unit
OUT/screen.parquet           one row a gene, in the order of the guesses
OUT/genes.txt                the same order, for `perturbation.genes_file` of an exact scan
OUT/exact/                   an ordinary scan: the deletions that the guesses are held against
OUT/screen.json              settings and agreement; written last
"""

import io
import sys
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from pydantic import JsonValue, ValidationError
from scipy.stats import spearmanr

from corpus.errors import UserError
from corpus.hashing import digest_json
from corpus.manifest import Record
from corpus.provenance import record_run
from corpus.store import Store
from evaluate.perturb_settings import PerturbationSettings, ScanSettings
from evaluate.scan import run_scan, state_centroids, worker_pool
from evaluate.scan_plan import WorkUnit, plan_units
from evaluate.scan_setup import Scan
from evaluate.screen_settings import ScreenSettings
from evaluate.screen_worker import GUESSES, ScreenWorker
from evaluate.shifts import SHIFT, read_shifts

SCREEN, GENES, TABLE = "screen.json", "genes.txt", "screen.parquet"
GUESS, EXACT = "guess_", "exact_"
_UNIT_TOKENS = 200_000
_TOP = 20


class Agreement(Record):
    """How guesses and exact mean shifts of the verified genes agree, for one state.

    Parameters
    ----------
    spearman_controls
        Rank correlation over the genes drawn at random: an estimate for all genes.
    spearman
        Over all verified genes.
    same_sign
        Share of the verified genes whose guess has the right sign.
    top
        Number of genes in `top_overlap`.
    top_overlap
        Share of the `top` verified genes with the largest exact shifts (either direction) that are also among the
        `top` with the largest guesses.
    """

    spearman_controls: float | None
    spearman: float | None
    same_sign: float
    top: int
    top_overlap: float


class ScreenManifest(Record):
    """What a screen did; written last.

    Parameters
    ----------
    screen_id
        Hash of model, corpus, cells and every setting that affects the result.
    genes
        Genes with a guess.
    forward_passes, exact_passes, all_passes
        Passes of the guesses (each also runs backward once for each state), of the verification, and of an exact scan
        of the same genes.
    top, controls
        Ensembl ids of the verified genes.
    agreement
        By state.
    """

    format_version: int = 1
    screen_id: str
    model_checksum: str
    settings: dict[str, JsonValue]
    goal: str
    num_cells: int
    genes: int
    forward_passes: int
    exact_passes: int
    all_passes: int
    top: list[str]
    controls: list[str]
    agreement: dict[str, Agreement]


def run_screen(settings: ScreenSettings, corpus: str, model: str, out: str) -> ScreenManifest:
    """Screen, verify, and publish; what is there already is not done again.

    Raises
    ------
    UserError
        If inputs do not fit each other, if too few genes are left, or if the folder holds another screen.
    """
    store = Store(out)
    scan = _scan(settings, corpus, model, f"{store.uri}/exact", PerturbationSettings(min_cells=settings.min_cells))
    verify = settings.verify.model_dump(mode="json")
    asked = {"format": 1, "scan": scan.scan_id, "verify": verify, "anchors": settings.anchors}
    screen_id = digest_json(asked, 32)
    if store.exists(SCREEN):
        found = _read(store)
        if found.screen_id != screen_id:
            raise UserError(
                f"{store.uri}: holds another screen (model, corpus or settings differ): choose another --out"
            )
        return found
    record_run(
        store,
        "evaluate screen",
        settings,
        {"model": scan.model.checksum, "corpus": scan.corpus_sha256, "genes": scan.corpus.genes.hash},
    )
    guesses = _guess(scan, store, screen_id, settings.anchors)
    top, controls = _choose(guesses, settings)
    exact = _scan(settings, corpus, model, f"{store.uri}/exact", PerturbationSettings(genes=top + controls))
    shifts = run_scan(exact)
    table = guesses.join(_exact_means(exact), on="ensembl_id", how="left", maintain_order="left")
    manifest = ScreenManifest(
        screen_id=screen_id,
        model_checksum=scan.model.checksum,
        settings=settings.model_dump(mode="json", exclude={"engine"}),
        goal=settings.states.goal,
        num_cells=len(scan.selection.cells),
        genes=len(table),
        forward_passes=len(scan.selection.cells) * settings.anchors,
        exact_passes=shifts.rows,
        all_passes=int(table["n_cells"].sum()),
        top=top,
        controls=controls,
        agreement={state: agreement(table, state, set(controls)) for state in settings.states.names},
    )
    sink = io.BytesIO()
    table.write_parquet(sink)
    store.create(TABLE, sink.getvalue())
    store.create(GENES, "".join(f"{name}\n" for name in table["ensembl_id"]).encode())
    store.create(SCREEN, manifest.to_json())
    return _read(store)


def agreement(table: pl.DataFrame, state: str, controls: set[str]) -> Agreement:
    """Compare guesses with exact means of the genes that have both.

    Parameters
    ----------
    table
        `ensembl_id`, `guess_<state>` and `exact_<state>`, null where a gene was not verified.
    controls
        Those drawn at random.
    """
    both = table.filter(pl.col(EXACT + state).is_not_null())
    guess, exact = both[GUESS + state].to_numpy(), both[EXACT + state].to_numpy()
    drawn = both["ensembl_id"].is_in(list(controls)).to_numpy()
    top = min(_TOP, max(len(both) // 4, 1))
    largest = [set(np.argsort(-np.abs(values), kind="stable")[:top].tolist()) for values in (guess, exact)]
    return Agreement(
        spearman_controls=_spearman(guess[drawn], exact[drawn]),
        spearman=_spearman(guess, exact),
        same_sign=float((np.sign(guess) == np.sign(exact)).mean()),
        top=top,
        top_overlap=len(largest[0] & largest[1]) / top,
    )


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Rank correlation; None where one side has no order."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def _scan(settings: ScreenSettings, corpus: str, model: str, out: str, change: PerturbationSettings) -> Scan:
    asked = ScanSettings(
        perturbation=change,
        states=settings.states,
        cells=settings.cells,
        readout=settings.readout,
        engine=settings.engine,
    )
    return Scan(asked, corpus, model, out)


def _guess(scan: Scan, store: Store, screen_id: str, anchors: int) -> pl.DataFrame:
    """Mean guesses of all genes, the largest towards the goal (in either direction) first."""
    ones = np.ones(len(scan.selection.cells), dtype=np.int64)
    units = plan_units(screen_id, scan.selection.cells, ones, scan.input_lengths, _UNIT_TOKENS)
    states = scan.job.states
    with worker_pool(scan.job, ScreenWorker) as pool:
        centroids = state_centroids(scan, pool)
        tasks: Any = ((unit, store.uri, centroids, anchors) for unit in units)
        for done, _ in enumerate(pool.run("guess", tasks), start=1):
            print(f"screen: {done}/{len(units)} units", file=sys.stderr, flush=True)
    parts = pl.concat([_read_guesses(store, unit) for unit in units])
    sums = parts.group_by("ensembl_id", "symbol").agg(pl.col("n_cells").sum(), pl.col("^sum_.*$").sum())
    means = [(pl.col(f"sum_{state}") / pl.col("n_cells")).alias(GUESS + state) for state in states]
    table = sums.select("ensembl_id", "symbol", "n_cells", *means)
    return table.sort(pl.col(GUESS + states[1]).abs(), "ensembl_id", descending=[True, False])


def _read_guesses(store: Store, unit: WorkUnit) -> pl.DataFrame:
    frame = pl.from_arrow(pq.read_table(io.BytesIO(store.read_bytes(GUESSES.format(unit.unit_id)))))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _choose(guesses: pl.DataFrame, settings: ScreenSettings) -> tuple[list[str], list[str]]:
    ids = guesses["ensembl_id"].to_list()
    wanted = settings.verify
    if len(ids) < wanted.top + wanted.controls:
        raise UserError(
            f"screen: {len(ids)} genes are in at least {settings.min_cells} cells, too few for verify.top "
            f"{wanted.top} and verify.controls {wanted.controls}: scan them exactly (evaluate perturb)"
        )
    others = np.random.default_rng(wanted.seed).permutation(np.arange(wanted.top, len(ids)))[: wanted.controls]
    return ids[: wanted.top], [ids[place] for place in sorted(others.tolist())]


def _exact_means(scan: Scan) -> pl.DataFrame:
    _, shifts = read_shifts(scan.out.uri)
    means = [pl.col(SHIFT + state).cast(pl.Float64).mean().alias(EXACT + state) for state in scan.job.states]
    return shifts.group_by("ensembl_id").agg(means)


def _read(store: Store) -> ScreenManifest:
    try:
        return ScreenManifest.model_validate_json(store.read_bytes(SCREEN))
    except ValidationError as error:
        raise UserError(f"{store.uri}/{SCREEN}: not a screen: {error.errors()[0]['msg']}") from error
