"""What all pictures share: style, colours, labels that do not collide, and how a figure becomes a file.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with any common colour vision can
tell apart (yellow darkened to show on white, black softened); where there are more classes than colours, markers change
too and groups are named in the picture.
"""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#8C8C3D", "#4D4D4D")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
MISSING = "#BBBBBB"
INK = "#222222"

STYLE: Any = {
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


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure of one panel; sizes in inches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def to_svg(figure: Figure) -> bytes:
    """Render as SVG; the same data gives the same bytes."""
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="svg", dpi=_SCATTER_DPI, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def to_png(figure: Figure) -> bytes:
    """Render as PNG at 160 dots per inch."""
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="png", dpi=_SCATTER_DPI, metadata={"Software": None})
    return stream.getvalue()


def shorten(label: str, longest: int = 32) -> str:
    """Cut a long label in its middle, and keep matplotlib from reading a `$` in it as a formula."""
    if len(label) > longest:
        half = (longest - 1) // 2
        label = f"{label[: longest - 1 - half]}…{label[-half:]}"
    return label.replace("$", r"\$")


def apart(places: np.ndarray, texts: Sequence[str]) -> list[int]:
    """Choose texts that do not cover each other, earlier ones first.

    Parameters
    ----------
    places
        float[texts, 2]: left ends, in points.
    """
    chosen: list[int] = []
    for i, text in enumerate(texts):
        free = all(
            abs(places[i, 1] - places[j, 1]) > 9
            or places[i, 0] > places[j, 0] + 5 * len(texts[j])
            or places[j, 0] > places[i, 0] + 5 * len(text)
            for j in chosen
        )
        if free:
            chosen.append(i)
    return chosen


def centre_of(members: np.ndarray) -> np.ndarray:
    """Member nearest to the median: the median itself may lie where no cell is."""
    nearest: np.ndarray = members[np.argmin(((members - np.median(members, axis=0)) ** 2).sum(axis=1))]
    return nearest


def halo() -> Any:
    """White rim that keeps a text readable over points."""
    return withStroke(linewidth=2.4, foreground="white")
