"""The verb `map`. What it needs is imported when it runs: torch would slow down `--help`."""

from pydantic import Field

from corpus.settings import Command, Uri
from evaluate.settings import UmapSettings


class MapCommand(Command):
    """Draw cells before and after one perturbation of a finished scan, on one UMAP, with the way to the goal state."""

    shifts: Uri
    """Folder of a finished scan with states; its settings say what is done to which cells."""
    corpus: Uri
    """The corpus that was scanned."""
    model: Uri
    """The model that was used."""
    out: Uri
    """Folder for map.png and cells.csv."""
    gene: str | None = None
    """Symbol or Ensembl id; of a joint list nothing need be named."""
    max_cells: int = Field(200, ge=3)
    """Most cells to perturb: the first, by the scan's seed, in which the perturbation changes anything."""
    max_state_cells: int = Field(500, ge=3)
    """Most unperturbed cells of each state."""
    seed: int = 0
    """Of the layout."""
    umap: UmapSettings = UmapSettings()

    def run(self) -> None:
        """Embed, lay out, draw."""
        from evaluate.perturb_map import write_map

        print(write_map(self))
