"""Settings of a search."""

from typing import Any

from pydantic import Field, model_validator

from corpus.settings import Settings, Uri
from train.settings import FinetuneOptions, Schedule

Range = tuple[float, float]


class SpaceSettings(Settings):
    """Where to search. A range of one point, or one choice, fixes that setting."""

    learning_rate: Range = (1e-5, 1e-3)
    """Lowest and highest, drawn on a log scale."""
    schedule: tuple[Schedule, ...] = ("linear", "cosine")
    """Choices."""
    warmup: Range = (0.0, 0.2)
    """Lowest and highest share of the training."""
    weight_decay: Range = (1e-3, 1e-1)
    """Lowest and highest, drawn on a log scale."""
    freeze_layers: tuple[int, ...] = (0, 1, 2)
    """Choices."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "SpaceSettings":
        for name in ("learning_rate", "warmup", "weight_decay"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"space.{name}: {low} is above {high}")
            if low <= 0 and name != "warmup":
                raise ValueError(f"space.{name}: a log scale needs a lowest value above 0, found {low}")
        if not 0 <= self.warmup[0] <= self.warmup[1] < 1:
            raise ValueError(f"space.warmup: shares lie between 0 and 1, found {self.warmup}")
        for name in ("schedule", "freeze_layers"):
            if not getattr(self, name):
                raise ValueError(f"space.{name}: no choice given")
        return self


class TuneSettings(Settings):
    """A search over fine-tuning settings. The best by validation macro F1 wins; it alone sees the test cells."""

    corpus: Uri
    """URI of the labelled corpus."""
    model: Uri
    """URI of the pretrained model folder."""
    out: Uri
    """URI of the folder to write."""
    trials: int = Field(8, ge=1)
    """Settings to try."""
    concurrent: int = Field(2, ge=1)
    """Trials at a time."""
    grace_epochs: int = Field(1, ge=1)
    """Epochs that every trial gets."""
    reduction: int = Field(2, ge=2)
    """Of this many trials that have come equally far, ASHA lets one go on (Li et al., arXiv:1810.05934)."""
    seed: int = Field(0, ge=0)
    """Of the draws from the space; the trainings have their own, in `finetune.seed`."""
    space: SpaceSettings = SpaceSettings()
    finetune: FinetuneOptions = FinetuneOptions()
    """Settings that all trials share; `finetune.workers` is each trial's."""

    def identity(self) -> dict[str, Any]:
        """Settings that a result depends on."""
        own = self.model_dump(mode="json", exclude={"corpus", "model", "out", "concurrent", "finetune"})
        return {**own, "finetune": self.finetune.identity()}
