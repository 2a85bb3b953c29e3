"""`python -m train pretrain | finetune`."""

import sys

from corpus.settings import Command, main
from train.settings import FinetuneSettings, PretrainSettings


class Pretrain(PretrainSettings, Command):
    """Train a new model to predict masked genes."""

    def run(self) -> None:
        """Train, and print the figures that matter."""
        from train.launch import train

        metrics = train(PretrainSettings.model_validate(self.model_dump()))
        print(
            f"held-out loss {metrics['heldout_loss']:.4f} (guessing by gene frequency: {metrics['unigram_loss']:.4f}), "
            f"accuracy {metrics['heldout_accuracy']:.4f}, {metrics['steps']} steps"
        )


class Finetune(FinetuneSettings, Command):
    """Train a cell classifier on top of a pretrained model."""

    def run(self) -> None:
        """Train, and print the figures that matter."""
        from train.launch import train

        metrics = train(FinetuneSettings.model_validate(self.model_dump()))
        for part in ("train", "validation", "test"):
            if f"{part}_accuracy" in metrics:
                accuracy, f1 = metrics[f"{part}_accuracy"], metrics[f"{part}_macro_f1"]
                print(f"{part:<10} accuracy {accuracy:.4f}, macro F1 {f1:.4f}")


VERBS: dict[str, type[Command]] = {"pretrain": Pretrain, "finetune": Finetune}

if __name__ == "__main__":
    sys.exit(main("train", VERBS))
