"""`python -m tune run`."""

import sys

from corpus.settings import Command, main
from tune.settings import TuneSettings


class Run(TuneSettings, Command):
    """Search for the best fine-tuning settings of a model on a labelled corpus."""

    def run(self) -> None:
        """Search, and name the best."""
        from tune.sweep import tune

        summary = tune(TuneSettings.model_validate(self.model_dump()))
        metrics = summary["best_metrics"]
        point = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in summary["best_point"].items())
        print(f"trials: {', '.join(f'{count} {state}' for state, count in summary['trials'].items())}")
        print(f"best: trial {summary['best_trial']} with {point}")
        for part in ("validation", "test"):
            if f"{part}_accuracy" in metrics:
                accuracy, f1 = metrics[f"{part}_accuracy"], metrics[f"{part}_macro_f1"]
                print(f"{part:<10} accuracy {accuracy:.4f}, macro F1 {f1:.4f}")


VERBS: dict[str, type[Command]] = {"run": Run}

if __name__ == "__main__":
    sys.exit(main("tune", VERBS))
