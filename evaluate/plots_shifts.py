"""Pictures of shifts, as pure functions from data to a matplotlib figure."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from evaluate.drawing import INK, MISSING, PALETTE, STYLE, apart, halo, new_figure, shorten

_MOST_POINTS = 300


def shift_distributions(
    genes: Sequence[tuple[str, np.ndarray]],
    pool: np.ndarray,
    *,
    value_label: str,
    highlight: Sequence[str] = (),
) -> Figure:
    """Distribution over cells of each gene's values, below that of all values.

    Each row has a box from the first to the third quartile with the median, whiskers from the 5th to the 95th
    percentile, and the cells (at most 300 of them, at even distances in rank) as dots.

    Parameters
    ----------
    genes
        (name, float[cells]) from top to bottom.
    pool
        float[values] of all perturbations; the grey band is its 5th to 95th percentile.
    highlight
        Names in bold.
    """
    rows = [("all perturbations", np.asarray(pool, dtype=np.float64)), *genes]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(5.6, 0.24 * len(rows) + 0.9)
        if len(pool):
            low, high = np.quantile(pool, [0.05, 0.95])
            axes.axvspan(low, high, color="#F0F0F0", linewidth=0)
        for place, (_, values) in enumerate(rows):
            ordered = np.sort(values[np.isfinite(values)])
            if not len(ordered):
                continue
            colour = MISSING if place == 0 else PALETTE[3] if np.mean(ordered) > 0 else PALETTE[0]
            p5, q1, median, q3, p95 = np.quantile(ordered, [0.05, 0.25, 0.5, 0.75, 0.95])
            axes.plot([p5, p95], [-place, -place], color="#666666", linewidth=0.8, zorder=2)
            axes.barh(-place, q3 - q1, left=q1, height=0.62, color=colour, alpha=0.55, linewidth=0, zorder=2)
            axes.plot([median, median], [-place - 0.31, -place + 0.31], color=INK, linewidth=1.4, zorder=4)
            shown = ordered[np.unique(np.linspace(0, len(ordered) - 1, _MOST_POINTS).astype(int))]
            # Spread by the golden ratio: even, and the same at every call.
            jitter = (np.arange(len(shown)) * 0.61803 % 1 - 0.5) * 0.5
            axes.scatter(shown, -place + jitter, s=4, c=colour, linewidths=0, alpha=0.8, zorder=3, rasterized=True)
        labels = [f"{shorten(name)} ({len(values):,})" for name, values in rows]
        axes.set_yticks(-np.arange(len(rows)), labels, fontsize=8)
        for tick, (name, _) in zip(axes.get_yticklabels(), rows, strict=True):
            if name in set(highlight):
                tick.set_fontweight("bold")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        axes.axvline(0, color="#999999", linewidth=0.8, zorder=1)
        axes.set_xlabel(f"{value_label}, one dot a cell")
        return figure


def agreement_scatter(
    first: np.ndarray, second: np.ndarray, flipped: np.ndarray, names: Sequence[str], *, title: str
) -> Figure:
    """Mean shifts of two scans against each other; genes of opposite sign stand out.

    Parameters
    ----------
    first, second
        float[genes].
    flipped
        bool[genes]: the signs differ.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(4.6, 4.4)
        for mask, colour, label in ((~flipped, MISSING, "same sign"), (flipped, PALETTE[3], "opposite sign")):
            axes.scatter(first[mask], second[mask], s=9, c=colour, linewidths=0, rasterized=True, label=label)
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.axvline(0, color="#999999", linewidth=0.8)
        farthest = np.argsort(-(np.abs(first) / _scale(first) + np.abs(second) / _scale(second)))[:40]
        figure.draw_without_rendering()
        places = axes.transData.transform(np.column_stack([first[farthest], second[farthest]])) * 72 / figure.dpi
        for k in apart(places, [shorten(names[i]) for i in farthest])[:12]:
            i = farthest[k]
            text = axes.annotate(
                shorten(names[i]), (first[i], second[i]), xytext=(4, 3), textcoords="offset points", fontsize=7
            )
            text.set_path_effects([halo()])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("mean shift in this scan")
        axes.set_ylabel("mean shift in the other")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        return figure


def _scale(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0)) or 1.0


def shift_map(
    states: Mapping[str, np.ndarray],
    before: np.ndarray,
    after: np.ndarray,
    along_before: np.ndarray,
    along_after: np.ndarray,
    *,
    title: str,
    start: str,
    goal: str,
) -> Figure:
    """Cells before and after a perturbation: on a UMAP with arrows, and on the line from start to goal.

    Parameters
    ----------
    states
        State to float[cells, 2]: places of unperturbed cells.
    before, after
        float[cells, 2]: places of the perturbed cells.
    along_before, along_after
        float[cells]: 0 at the centroid of the start state, 1 at that of the goal.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 4.3), layout="constrained")
        axes, line = figure.subplots(1, 2, width_ratios=[1.25, 1])
        for i, (state, points) in enumerate(states.items()):
            axes.scatter(
                points[:, 0], points[:, 1], s=9, c=PALETTE[i % len(PALETTE)], alpha=0.45, linewidths=0,
                rasterized=True, label=f"{shorten(state)} ({len(points):,})",
            )  # fmt: skip
        of_start = PALETTE[list(states).index(start) % len(PALETTE)]
        axes.scatter(before[:, 0], before[:, 1], s=9, c=of_start, alpha=0.45, linewidths=0, rasterized=True)
        step = after - before
        axes.quiver(
            before[:, 0], before[:, 1], step[:, 0], step[:, 1], angles="xy", scale_units="xy", scale=1, color=INK,
            width=0.0022, headwidth=5, headlength=6, minlength=0.5, zorder=3,
        )  # fmt: skip
        axes.scatter(after[:, 0], after[:, 1], s=7, c=INK, linewidths=0, zorder=4, label=f"perturbed ({len(after):,})")
        middles = [np.median(states[state], axis=0) for state in (start, goal)]
        axes.annotate(
            "", middles[1], middles[0], zorder=2,
            arrowprops={"arrowstyle": "-|>", "color": "#777777", "linewidth": 2.5, "alpha": 0.6, "mutation_scale": 18},
        )  # fmt: skip
        for middle, state in zip(middles, (start, goal), strict=True):
            text = axes.text(*middle, shorten(state, 20), fontsize=8, ha="center", va="center", zorder=5)
            text.set_path_effects([halo()])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("UMAP 1")
        axes.set_ylabel("UMAP 2")
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"{shorten(title)}: arrows from before to after")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=len(states) + 1, fontsize=8, markerscale=1.6,
                    handletextpad=0.2, columnspacing=1.0)  # fmt: skip
        order = np.argsort(along_before, kind="stable")
        heights = np.arange(len(order))
        moved = along_after[order] - along_before[order]
        for towards, colour, label in ((True, PALETTE[3], f"towards {goal}"), (False, PALETTE[0], "away from it")):
            rows = np.flatnonzero((moved > 0) == towards)
            line.quiver(
                along_before[order][rows], heights[rows], moved[rows], np.zeros(len(rows)), angles="xy",
                scale_units="xy", scale=1, color=colour, width=0.004, headwidth=4, headlength=5, headaxislength=4.5,
                minlength=0, label=f"{shorten(label)} ({len(rows):,})",
            )  # fmt: skip
        low, high = min(along_before.min(), along_after.min()), max(along_before.max(), along_after.max())
        margin = 0.05 * (high - low or 1.0)
        line.set_xlim(low - margin, high + margin)
        line.set_ylim(-1, len(order))
        for place, state in ((0, start), (1, goal)):
            if low - margin <= place <= high + margin:
                line.axvline(place, color="#999999", linewidth=0.9, linestyle="--")
                line.annotate(shorten(state, 16), (place, 1.01), xycoords=("data", "axes fraction"), ha="center",
                              fontsize=8)  # fmt: skip
        line.set_yticks([])
        line.set_ylabel("cells, by where they began")
        line.set_xlabel(f"place on the line from {shorten(start, 16)} (0) to {shorten(goal, 16)} (1)")
        line.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
        return figure
