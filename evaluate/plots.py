"""Pictures, as pure functions from data to a matplotlib figure.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with any common colour vision can
tell apart; where there are more classes than colours, markers change too and groups are named in the picture.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#8C8C3D", "#4D4D4D")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
MISSING = "#BBBBBB"
INK = "#222222"

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "mouse-geneformer",
    "axes.unicode_minus": True,
}
_SCATTER_DPI = 160


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def to_svg(figure: Figure) -> bytes:
    """Render as SVG; the same data gives the same bytes."""
    stream = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(stream, format="svg", dpi=_SCATTER_DPI, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def to_png(figure: Figure) -> bytes:
    """Render as PNG at 160 dots per inch."""
    stream = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(stream, format="png", dpi=_SCATTER_DPI, metadata={"Software": None})
    return stream.getvalue()


def histogram(
    values: np.ndarray, label: str, thresholds: Mapping[str, float] | None = None, log: bool = False
) -> Figure:
    """Cells per value of one measure, with thresholds as dashed lines.

    Parameters
    ----------
    values
        float[cells], one entry a cell.
    label
        Name of the axis, with the unit.
    thresholds
        Name of a threshold to its value; drawn if finite.
    log
        Logarithmic horizontal axis, for positive values.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.6, 2.4)
        values = values[np.isfinite(values)]
        lines = {name: value for name, value in (thresholds or {}).items() if np.isfinite(value)}
        if log:
            values = values[values > 0]
            lines = {name: value for name, value in lines.items() if value > 0}
        everything = np.concatenate([values, list(lines.values())]) if lines else values
        if not len(everything):
            axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)
            return figure
        low, high = float(everything.min()), float(everything.max())
        if low == high:
            low, high = (low * 0.9, high * 1.1) if low > 0 else (low - 0.5, high + 0.5)
        bins = np.geomspace(low, high, 51) if log else np.linspace(low, high, 51)
        axes.hist(values, bins=bins.tolist(), color=PALETTE[0], linewidth=0)
        for name, value in lines.items():
            axes.axvline(value, color=PALETTE[3], linestyle="--", linewidth=1.2)
            near_end = value > (np.sqrt(low * high) if log else (low + high) / 2)
            axes.annotate(
                name,
                (value, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(-3 if near_end else 3, 0),
                textcoords="offset points",
                ha="right" if near_end else "left",
                va="top",
                fontsize=7.5,
                color=PALETTE[3],
            )
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("cells")
        return figure


def loss_curves(
    train: tuple[np.ndarray, np.ndarray], heldout: tuple[np.ndarray, np.ndarray], unigram_loss: float | None, unit: str
) -> Figure:
    """Training and held-out loss by step.

    Parameters
    ----------
    train, heldout
        (steps, losses), one-dimensional and of equal length; either may be empty.
    unigram_loss
        Held-out loss of always predicting the gene frequencies, drawn as a line.
    unit
        For example "nats per masked gene".
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(6.4, 3.4)
        steps, losses = train
        if len(steps):
            window = max(1, len(losses) // 40)
            axes.plot(steps, losses, color=PALETTE[4], linewidth=0.8, alpha=0.6 if window > 1 else 1.0)
            if window > 1:
                kernel = np.ones(window) / window
                smooth = np.convolve(losses, kernel, mode="valid")
                centre = np.convolve(steps, kernel, mode="valid")
                axes.plot(centre, smooth, color=PALETTE[0], linewidth=1.6, label=f"training (mean of {window})")
            else:
                axes.lines[0].set_label("training")
        if len(heldout[0]):
            axes.plot(*heldout, color=PALETTE[3], marker="o", markersize=3.5, linewidth=1.4, label="held out")
        if unigram_loss is not None:
            axes.axhline(unigram_loss, color="#666666", linestyle="--", linewidth=1.1, label="gene frequencies alone")
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(f"loss ({unit})")
        axes.legend()
        return figure


def confusion_matrix(counts: np.ndarray, labels: Sequence[str]) -> Figure:
    """Row-normalised heat map: of the cells of a true class (row), the share given each label (column).

    Parameters
    ----------
    counts
        int[classes, classes], rows true, columns predicted. Rows without cells stay grey.
    """
    num = len(labels)
    support = counts.sum(axis=1)
    shares = np.divide(counts, support[:, None], out=np.full(counts.shape, np.nan), where=support[:, None] > 0)
    with mpl.rc_context(_STYLE):
        longest = max((len(label) for label in labels), default=0)
        side = max(3.2, 0.42 * num) + 0.075 * min(longest, 40)
        figure, axes = _figure(side + 0.9, side)
        colours = mpl.colormaps["Blues"].with_extremes(bad="#EEEEEE")
        image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
        for row, column in np.argwhere(np.nan_to_num(shares) >= 0.005):
            share = shares[row, column]
            axes.text(
                column,
                row,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share > 0.55 else INK,
            )
        axes.set_xticks(
            range(num), [shorten(label) for label in labels], rotation=60, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(
            range(num), [f"{shorten(label)} ({count:,})" for label, count in zip(labels, support, strict=True)]
        )
        axes.set_xticks(np.arange(num + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(num + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="both", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true (number of cells)")
        bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=25, pad=0.02)
        bar.set_label("% of the true class")
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure


def embedding_scatter(points: np.ndarray, groups: Sequence[str | None], title: str, named: bool = True) -> Figure:
    """Two-dimensional embedding coloured by group; cells without a group are grey and lie below.

    Parameters
    ----------
    points
        float[cells, 2].
    groups
        One entry a cell.
    named
        Write each group's name at its median position, so that colours need not be told apart; of names that would
        cover each other, that of the larger group.
    """
    names = np.array(["" if group is None else str(group) for group in groups], dtype=object)
    finite = np.isfinite(points).all(axis=1)
    sizes = {name: int((names[finite] == name).sum()) for name in set(names[finite]) if name}
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(6.6, 4.8)
        size = float(np.clip(9000 / max(len(points), 1), 1.5, 14))
        missing = finite & (names == "")
        if missing.any():
            axes.scatter(
                points[missing, 0],
                points[missing, 1],
                s=size,
                c=MISSING,
                linewidths=0,
                rasterized=True,
                label="not given",
            )
        for i, name in enumerate(order):
            mask = finite & (names == name)
            axes.scatter(
                points[mask, 0],
                points[mask, 1],
                s=size,
                c=PALETTE[i % len(PALETTE)],
                marker=MARKERS[i // len(PALETTE) % len(MARKERS)],
                linewidths=0,
                alpha=0.8,
                rasterized=True,
                label=f"{shorten(name)} ({sizes[name]:,})",
            )
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("UMAP 1")
        axes.set_ylabel("UMAP 2")
        axes.set_aspect("equal", adjustable="datalim")
        if order:
            axes.legend(
                loc="center left",
                bbox_to_anchor=(1, 0.5),
                fontsize=7.5,
                markerscale=max(1.0, (30 / size) ** 0.5),
                handletextpad=0.2,
                ncols=1 if len(order) <= 26 else 2,
            )
        if named and len(order):
            figure.draw_without_rendering()  # now the scales are known
            centres = np.array([np.median(points[finite & (names == name)], axis=0) for name in order])
            texts = [shorten(name, 20) for name in order]
            places = axes.transData.transform(centres) * 72 / figure.dpi
            places[:, 0] -= [2 * len(text) for text in texts]
            for i in _apart(places, texts):
                text = axes.text(centres[i, 0], centres[i, 1], texts[i], fontsize=7, ha="center", va="center")
                text.set_path_effects([_halo()])
        return figure


def volcano(
    effect: np.ndarray,
    fdr: np.ndarray,
    names: Sequence[str],
    *,
    effect_label: str,
    significance_label: str = "FDR",
    threshold: float = 0.05,
    highlight: Sequence[str] = (),
    num_labels: int = 10,
) -> Figure:
    """Effect of each gene against its significance.

    Parameters
    ----------
    effect, fdr
        float[genes]; genes whose significance is missing are left out and counted in the title.
    names
        Symbol of each gene.
    highlight
        Symbols that are marked and named wherever they lie.
    num_labels
        Further genes to name: those of lowest `fdr`, then of largest effect.
    """
    effect, fdr = np.asarray(effect, dtype=np.float64), np.asarray(fdr, dtype=np.float64)
    known = np.isfinite(effect) & np.isfinite(fdr)
    # A permutation-free p-value may underflow to 0: drawn one step above the smallest positive one.
    positive = fdr[known & (fdr > 0)]
    floor = float(positive.min()) / 10 if len(positive) else 1e-3
    height = -np.log10(np.maximum(np.where(known, fdr, 1.0), floor))
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(6.4, 4.2)
        strong = known & (fdr < threshold)
        for mask, colour, label in (
            (known & ~strong, MISSING, f"{significance_label} ≥ {threshold:g} ({int((known & ~strong).sum()):,})"),
            (
                strong & (effect > 0),
                PALETTE[3],
                f"towards the goal ({int((strong & (effect > 0)).sum()):,})",
            ),
            (strong & (effect <= 0), PALETTE[0], f"away from it ({int((strong & (effect <= 0)).sum()):,})"),
        ):
            axes.scatter(effect[mask], height[mask], s=9, c=colour, linewidths=0, rasterized=True, label=label)
        axes.axhline(-np.log10(threshold), color="#666666", linestyle="--", linewidth=0.9)
        axes.axvline(0, color="#999999", linewidth=0.8)
        marked = [i for i, name in enumerate(names) if name in set(highlight) and known[i]]
        ranked = sorted(np.flatnonzero(known), key=lambda i: (fdr[i], -abs(effect[i])))
        axes.margins(y=0.08)
        wanted = [*marked, *(int(i) for i in ranked[: 4 * num_labels] if i not in marked)]
        figure.draw_without_rendering()
        places = axes.transData.transform(np.column_stack([effect[wanted], height[wanted]])) * 72 / figure.dpi
        free = _apart(places, [shorten(names[i]) for i in wanted], len(marked))
        for i in [wanted[k] for k in free[: len(marked) + num_labels]]:
            is_marked = i in marked
            if is_marked:
                axes.scatter(effect[i], height[i], s=42, facecolors="none", edgecolors=INK, linewidths=1.3, zorder=4)
            text = axes.annotate(
                shorten(names[i]),
                (effect[i], height[i]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=8 if is_marked else 7,
                fontweight="bold" if is_marked else "normal",
                zorder=5,
            )
            text.set_path_effects([_halo()])
        left_out = int((~known).sum())
        if left_out:
            axes.set_title(f"not shown: {left_out:,} without a test", fontweight="normal", fontsize=8)
        axes.set_xlabel(effect_label)
        axes.set_ylabel(f"−log10 {significance_label}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, handletextpad=0.2, columnspacing=1.2)
        return figure


def gene_bars(
    effect: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    names: Sequence[str],
    *,
    effect_label: str,
    num_each: int = 15,
    highlight: Sequence[str] = (),
) -> Figure:
    """Genes of largest positive and of largest negative effect, with intervals.

    Parameters
    ----------
    effect, low, high
        float[genes]: estimate and interval; a missing interval is not drawn.
    num_each
        Genes from each end.
    """
    effect = np.asarray(effect, dtype=np.float64)
    order = [int(i) for i in np.argsort(-effect, kind="stable") if np.isfinite(effect[i])]
    top = [i for i in order[:num_each] if effect[i] > 0]
    bottom = [i for i in order[::-1][:num_each] if effect[i] < 0][::-1]
    blocks = [top, bottom, _marked_rest(names, highlight, top, bottom)]
    chosen = [i for block in blocks for i in block]
    gaps = np.repeat(np.arange(len(blocks)) * 0.6, [len(block) for block in blocks])
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.6, max(1.8, 0.19 * len(chosen) + 1.0))
        places = -(np.arange(len(chosen)) + gaps)
        colours = [PALETTE[3] if effect[i] > 0 else PALETTE[0] for i in chosen]
        axes.barh(places, effect[chosen], color=colours, height=0.72)
        for place, i in zip(places, chosen, strict=True):
            if np.isfinite(low[i]) and np.isfinite(high[i]):
                axes.plot([low[i], high[i]], [place, place], color=INK, linewidth=1)
        axes.set_yticks(places, [shorten(names[i]) for i in chosen], fontsize=8)
        for tick, i in zip(axes.get_yticklabels(), chosen, strict=True):
            if names[i] in set(highlight):
                tick.set_fontweight("bold")
        axes.axvline(0, color="#666666", linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.01)
        axes.set_xlabel(effect_label)
        return figure


def _marked_rest(
    names: Sequence[str], highlight: Sequence[str], top: Sequence[int], bottom: Sequence[int]
) -> list[int]:
    shown = {names[i] for i in (*top, *bottom)}
    return [i for i, name in enumerate(names) if name in set(highlight) and name not in shown]


def accuracy_bars(rows: Sequence[tuple[str, float, tuple[float, float] | None]], label: str) -> Figure:
    """Compare methods: (name, value in 0..1, interval or None), best practice first."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.6, 0.45 * len(rows) + 0.9)
        places = np.arange(len(rows))[::-1]
        values = [value for _, value, _ in rows]
        axes.barh(places, values, color=[PALETTE[0], *[MISSING] * (len(rows) - 1)], height=0.62)
        for place, (_, value, interval) in zip(places, rows, strict=True):
            end = value
            if interval is not None:
                axes.plot(interval, [place, place], color=INK, linewidth=1.2)
                end = max(end, interval[1])
            axes.text(end + 0.01, place, f"{100 * value:.1f} %", va="center", fontsize=8.5)
        axes.set_yticks(places, [name for name, _, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.set_xlabel(label)
        return figure


def trials_scatter(
    setting: np.ndarray, score: np.ndarray, stopped: np.ndarray, *, setting_label: str, score_label: str, log: bool
) -> Figure:
    """Score of each trial against one setting; trials that the scheduler stopped early are hollow.

    Parameters
    ----------
    setting, score
        float[trials].
    stopped
        bool[trials].
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.2, 3.0)
        done = ~stopped
        axes.scatter(setting[done], score[done], s=36, c=PALETTE[0], label="ran to its end")
        if stopped.any():
            axes.scatter(
                setting[stopped], score[stopped], s=36, facecolors="none", edgecolors=PALETTE[3], label="stopped early"
            )
        if np.isfinite(score).any():
            best = int(np.nanargmax(score))
            axes.annotate(
                "best", (setting[best], score[best]), xytext=(6, 4), textcoords="offset points", fontweight="bold"
            )
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(setting_label)
        axes.set_ylabel(score_label)
        axes.legend(loc="best")
        return figure


def shorten(label: str, longest: int = 32) -> str:
    """Cut a long label in its middle, and keep matplotlib from reading a `$` in it as a formula."""
    if len(label) > longest:
        half = (longest - 1) // 2
        label = f"{label[: longest - 1 - half]}…{label[-half:]}"
    return label.replace("$", r"\$")


def _apart(places: np.ndarray, texts: Sequence[str], obstacles: int = 0) -> list[int]:
    """Choose texts that do not cover each other, earlier ones first.

    Parameters
    ----------
    places
        float[texts, 2]: left ends, in points.
    obstacles
        So many of the first are chosen in any case.
    """
    chosen: list[int] = []
    for i, text in enumerate(texts):
        free = all(
            abs(places[i, 1] - places[j, 1]) > 9
            or places[i, 0] > places[j, 0] + 5 * len(texts[j])
            or places[j, 0] > places[i, 0] + 5 * len(text)
            for j in chosen
        )
        if free or i < obstacles:
            chosen.append(i)
    return chosen


def _halo() -> Any:
    return withStroke(linewidth=2.4, foreground="white")
