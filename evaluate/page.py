"""What a report page is made of, and how it becomes HTML. Nothing here knows what the numbers mean."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure as Drawing

from evaluate.plots import to_svg

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Facts:
    """Names and values, one a line."""

    rows: Sequence[tuple[str, Any]]
    kind: str = "facts"


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by a click; numbers are told apart from text by their type."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Parameters
    ----------
    alt
        What it shows, for those who cannot see it.
    """

    drawing: Drawing
    alt: str
    caption: str = ""

    @property
    def uri(self) -> str:
        """The picture as a data URI: in an <img>, an SVG can neither run scripts nor load anything."""
        return "data:image/svg+xml;base64," + base64.b64encode(to_svg(self.drawing)).decode()


@dataclass(frozen=True)
class StoredPicture:
    """A PNG file that another command drew; see `Picture`."""

    data: bytes
    alt: str
    caption: str = ""

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.data).decode()


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side as far as there is room."""

    pictures: Sequence[Picture | StoredPicture]
    kind: str = "pictures"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Note:
    """Something that must not be overlooked."""

    text: str
    kind: str = "note"


@dataclass(frozen=True)
class Details:
    """Long text that is folded away."""

    title: str
    text: str
    kind: str = "details"


Block = Facts | Table | Pictures | Text | Note | Details


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Parameters
    ----------
    key
        Its anchor.
    tiles
        Headline numbers for the summary: (what, value, remark).
    """

    key: str
    title: str
    blocks: Sequence[Block]
    tiles: Sequence[tuple[str, str, str]] = ()
    caveats: Sequence[str] = field(default=())


def not_run(key: str, title: str, command: str) -> Section:
    """Stand in for a part that was not given."""
    return Section(key, title, [Note(f"Not run: {command} was not part of this report.")])


def render(title: str, created: str, sections: Sequence[Section]) -> str:
    """Make the page; every text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = format_cell
    environment.tests["numeric"] = is_number
    page = environment.get_template("report.html.j2")
    return page.render(title=title, created=created, sections=sections)


def is_number(value: Any) -> bool:
    """Tell numbers (but not truth values) from text."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_cell(value: Any) -> str:
    """Write a value as a reader wants it: 1,234; 0.0123; 1.2e-07; a dash for what is not known."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0:
            return "0"
        size = abs(value)
        if size >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3g}" if size < 1 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(format_cell(item) for item in value) or "–"
    return str(value)


def percent(value: float | None) -> str:
    """0.9123 as 91.2 %."""
    return "–" if value is None else f"{100 * value:.1f} %"
