"""Pictures, as pure functions from data to a matplotlib figure."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from evaluate.drawing import (
    INK,
    MARKERS,
    MISSING,
    PALETTE,
    STYLE,
    apart,
    centre_of,
    halo,
    new_figure,
    shorten,
    to_png,
    to_svg,
)

__all__ = [
    "accuracy_bars",
    "binned",
    "confusion_matrix",
    "embedding_scatter",
    "gene_bars",
    "histogram",
    "loss_curves",
    "shorten",
    "to_png",
    "to_svg",
    "trials_scatter",
    "volcano",
]


def histogram(
    edges: np.ndarray,
    kept: np.ndarray,
    label: str,
    *,
    before: np.ndarray | None = None,
    thresholds: Mapping[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """Cells per bin of one measure, with thresholds as dashed lines.

    Parameters
    ----------
    edges
        float[bins + 1], ascending.
    kept, before
        int[bins]: cells of the corpus, and (as an outline) cells before quality control.
    label
        Name of the axis, with the unit.
    thresholds
        Name of a threshold to its value; drawn if finite.
    log
        Logarithmic horizontal axis; a bin that begins at 0 is then drawn one octave wide, and thresholds at 0 are not.
    """
    outline = kept if before is None else before
    filled = np.flatnonzero(np.maximum(kept, outline))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(3.3, 2.4)
        if not len(filled):
            axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)
            return figure
        first, last = filled[0], filled[-1] + 1
        edges, kept, outline = edges[first : last + 1].astype(np.float64), kept[first:last], outline[first:last]
        if log and edges[0] <= 0:
            edges[0] = edges[1] / 2
        if before is not None:
            axes.stairs(outline, edges, color="#666666", linewidth=1, label="read")
        axes.stairs(kept, edges, fill=True, color=PALETTE[0], label="kept")
        lines = {name: x for name, x in (thresholds or {}).items() if np.isfinite(x) and (x > 0 or not log)}
        low, high = min([edges[0], *lines.values()]), max([edges[-1], *lines.values()])
        middle = float(np.sqrt(low * high)) if log else (low + high) / 2
        for name, value in lines.items():
            axes.axvline(value, color=PALETTE[3], linestyle="--", linewidth=1.2)
            axes.annotate(
                shorten(name),
                (value, 1.01),
                xycoords=("data", "axes fraction"),
                ha="right" if value > middle else "left",
                va="bottom",
                fontsize=7.5,
                color=PALETTE[3],
            )
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("cells")
        if before is not None:
            axes.legend(fontsize=7.5, loc="upper right")
        return figure


def binned(values: np.ndarray, log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Edges and cells of 50 bins over the finite (on a log scale, positive) values."""
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return np.array([0.0, 1.0]), np.zeros(1, dtype=np.int64)
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = (low * 0.9, high * 1.1) if low > 0 else (low - 0.5, high + 0.5)
    edges = np.geomspace(low, high, 51) if log else np.linspace(low, high, 51)
    edges[0], edges[-1] = low, high  # geomspace may miss its ends by a rounding
    return edges, np.histogram(values, edges)[0]


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
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(6.4, 3.4)
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
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right")
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
    with mpl.rc_context(STYLE):
        longest = max((len(label) for label in labels), default=0)
        side = max(3.2, 0.42 * num) + 0.075 * min(longest, 40)
        figure, axes = new_figure(side + 0.9, side)
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
        Write each group's name at its centre, so that colours need not be told apart; of names that would
        cover each other, that of the larger group.
    """
    names = np.array(["" if group is None else str(group) for group in groups], dtype=object)
    finite = np.isfinite(points).all(axis=1)
    sizes = {name: int((names[finite] == name).sum()) for name in set(names[finite]) if name}
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(5.15, 4.0)
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
                fontsize=7,
                markerscale=max(1.0, (30 / size) ** 0.5),
                handletextpad=0.2,
                ncols=1 if len(order) <= 26 else 2,
            )
        if named and len(order):
            figure.draw_without_rendering()  # now the scales are known
            centres = np.array([centre_of(points[finite & (names == name)]) for name in order])
            texts = [shorten(name, 20) for name in order]
            places = axes.transData.transform(centres) * 72 / figure.dpi
            places[:, 0] -= [2 * len(text) for text in texts]
            for i in apart(places, texts):
                text = axes.text(centres[i, 0], centres[i, 1], texts[i], fontsize=7, ha="center", va="center")
                text.set_path_effects([halo()])
        return figure


def volcano(
    effect: np.ndarray,
    fdr: np.ndarray,
    names: Sequence[str],
    *,
    effect_label: str,
    significance_label: str = "FDR",
    threshold: float = 0.05,
    significant: np.ndarray | None = None,
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
    significant
        bool[genes]; by default those whose `fdr` is below the threshold.
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
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(5.4, 4.2)
        strong = known & (fdr < threshold if significant is None else significant)
        weak = f"{significance_label} ≥ {threshold:g}" if significant is None else "not significant"
        for mask, colour, label in (
            (known & ~strong, MISSING, f"{weak} ({int((known & ~strong).sum()):,})"),
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
        axes.scatter(effect[marked], height[marked], s=42, facecolors="none", edgecolors=INK, linewidths=1.3, zorder=4)
        for i in [wanted[k] for k in apart(places, [shorten(names[i]) for i in wanted])[: len(marked) + num_labels]]:
            is_marked = i in marked
            text = axes.annotate(
                shorten(names[i]),
                (effect[i], height[i]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=8 if is_marked else 7,
                fontweight="bold" if is_marked else "normal",
                zorder=5,
            )
            text.set_path_effects([halo()])
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
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(4.8, max(1.8, 0.19 * len(chosen) + 1.0))
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
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(5.6, 0.45 * len(rows) + 0.9)
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
        float[trials]; trials without a score are left out.
    stopped
        bool[trials].
    """
    known = np.isfinite(setting) & np.isfinite(score)
    setting, score, stopped = setting[known], score[known], stopped[known]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(5.2, 3.0)
        if not len(score):
            axes.text(0.5, 0.5, "no trial has a score", ha="center", va="center", transform=axes.transAxes)
            return figure
        done = ~stopped
        axes.scatter(setting[done], score[done], s=36, c=PALETTE[0], label="ran to its end")
        if stopped.any():
            axes.scatter(
                setting[stopped], score[stopped], s=36, facecolors="none", edgecolors=PALETTE[3], label="stopped early"
            )
        best = int(np.argmax(score))
        axes.annotate(
            "best", (setting[best], score[best]), xytext=(6, 4), textcoords="offset points", fontweight="bold"
        )
        if log:
            axes.set_xscale("log")
            narrow = setting.max() / setting.min() < 200
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(setting_label)
        axes.set_ylabel(score_label)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return figure
