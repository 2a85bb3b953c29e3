"""Settings of the first-order screen."""

from typing import Self

from pydantic import Field, model_validator

from corpus.settings import Settings
from evaluate.perturb_settings import CellSettings, EngineSettings, ReadoutSettings, StateSettings


class VerifySettings(Settings):
    """Which genes are deleted exactly as well, to measure how good the screen's order is."""

    top: int = Field(50, ge=2)
    """Genes with the largest guesses towards the goal, in either direction."""
    controls: int = Field(50, ge=10)
    """Genes drawn at random from the others: their agreement is that of all genes."""
    seed: int = 0
    """Of the draw."""


class ScreenSettings(Settings):
    """A first-order screen of deletions."""

    states: StateSettings
    """Cell states; the order of genes is that of their guessed shifts towards the goal."""
    anchors: int = Field(5, ge=1)
    """Sequences run for each cell, forward once and backward once for each state; with 1 the guess is the slope alone,
    which is poor where the model's position embeddings are rough."""
    min_cells: int = Field(10, ge=1)
    """Leave out genes in the input of fewer than this many of the scanned cells."""
    cells: CellSettings = CellSettings()
    readout: ReadoutSettings = ReadoutSettings()
    verify: VerifySettings = VerifySettings()
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _has_guesses(self) -> Self:
        if self.readout.compat != "none":
            raise ValueError("readout.compat: the screen guesses our own comparison; compat belongs to exact scans")
        return self
