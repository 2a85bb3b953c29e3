"""`make demo`: from real mouse cells to a perturbation report, by the same commands that a user types.

Every step is a command of README.md with a settings file of examples/demo. A step that was killed goes on where it was;
a step that is done is re-used as long as its command, its settings and the steps before it are the same.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/demo")
CONFIGS = Path("examples/demo")


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Parameters
    ----------
    name
        Name of the step and of its settings file, if it has one.
    command
        Arguments of `python -m`.
    needs
        Steps whose outputs it reads.
    """

    name: str
    command: list[str]
    needs: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        """Settings file; it may be absent."""
        return CONFIGS / f"{self.name}.toml"

    @property
    def arguments(self) -> list[str]:
        """The whole command line after the interpreter."""
        config = ["--config", str(self.config)] if (ROOT / self.config).exists() else []
        return ["-m", *self.command[:2], *config, *self.command[2:]]


def path(name: str) -> str:
    """Where an output of the demo lies."""
    return str(FOLDER / name)


STEPS = [
    Step("sample", ["ingest", "sample", "baron-mouse", "--out", path("data")]),
    Step("ingest", ["ingest", "run", "--out", path("corpus")], ["sample"]),
    Step("verify", ["ingest", "verify", path("corpus")], ["ingest"]),
    Step("pretrain", ["train", "pretrain", "--corpus", path("corpus"), "--out", path("model")], ["verify"]),
    Step(
        "finetune",
        ["train", "finetune", "--corpus", path("corpus"), "--model", path("model"), "--out", path("classifier")],
        ["pretrain"],
    ),
    Step(
        "tune",
        ["tune", "run", "--corpus", path("corpus"), "--model", path("model"), "--out", path("tune")],
        ["pretrain"],
    ),
    Step(
        "embed",
        ["evaluate", "embed", "--corpus", path("corpus"), "--model", path("model"), "--out", path("embedding.h5ad")],
        ["pretrain"],
    ),
    Step(
        "classify",
        ["evaluate", "classify", "--corpus", path("corpus"), "--model", path("classifier"), "--out", path("classify")],
        ["finetune"],
    ),
    Step(
        "perturb",
        ["evaluate", "perturb", "--corpus", path("corpus"), "--model", path("classifier"), "--out", path("perturb")],
        ["finetune"],
    ),
    Step("stats", ["evaluate", "stats", "--shifts", path("perturb"), "--out", path("stats")], ["perturb"]),
    Step("report", ["evaluate", "report", "--out", path("report.html")], ["classify", "tune", "embed", "stats"]),
]


def fingerprint(step: Step, upstream: dict[str, str]) -> str:
    """Hash of the command, its settings file and the fingerprints of the steps it needs."""
    config = ROOT / step.config
    text = config.read_text() if config.exists() else ""
    parts = [step.arguments, text, [upstream[name] for name in step.needs]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def run(step: Step, mark: str) -> float:
    """Run one step unless it is done; return its seconds (0 if it was re-used).

    Raises
    ------
    SystemExit
        If the command fails; with what to do next.
    """
    stamp = ROOT / FOLDER / ".done" / f"{step.name}.json"
    if stamp.exists() and json.loads(stamp.read_text())["fingerprint"] == mark:
        print(f"== {step.name}: done already", flush=True)
        return 0.0
    print(f"\n== {step.name}: python {' '.join(step.arguments)}", flush=True)
    start = time.monotonic()
    status = subprocess.run([sys.executable, *step.arguments], cwd=ROOT, env=environment(), check=False).returncode
    if status:
        raise SystemExit(
            f"\ndemo: step {step.name} failed with status {status} (its message is above). `make demo` goes on from "
            f"here; to begin again with other settings, remove {FOLDER}"
        )
    seconds = time.monotonic() - start
    stamp.parent.mkdir(parents=True, exist_ok=True)
    part = stamp.with_suffix(".part")
    part.write_text(json.dumps({"fingerprint": mark, "seconds": round(seconds, 1)}) + "\n")
    part.replace(stamp)
    return seconds


def environment() -> dict[str, str]:
    """The demo's clusters live for one command on this machine: no token, no telemetry."""
    return {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **os.environ}


def read_json(name: str) -> dict[str, Any]:
    """Read an output of the demo."""
    content: dict[str, Any] = json.loads((ROOT / FOLDER / name).read_text())
    return content


def main() -> None:
    """Run all steps, then say where the report is and what came out."""
    marks: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for step in STEPS:
        marks[step.name] = fingerprint(step, marks)
        seconds[step.name] = run(step, marks[step.name])
    print("\n" + "\n".join(figures()))
    print(f"\nThis call took {sum(seconds.values()):.0f} s. The report: {ROOT / FOLDER / 'report.html'}")


def figures() -> list[str]:
    """The figures that matter, from the files of the run."""
    newest = max(path.name for path in (ROOT / FOLDER / "corpus" / "reports").glob("*.json"))
    report, model = read_json(f"corpus/reports/{newest}"), read_json("model/metrics.json")
    classify, tune = read_json("classify/metrics.json"), read_json("tune/summary.json")
    scored, baseline, best = classify["model"], classify["baseline"], tune["best_metrics"]
    genes = pl.read_parquet(ROOT / FOLDER / "stats" / "genes.parquet")
    goal = genes.filter(pl.col("state") == "beta", pl.col("p_value").is_not_null())
    ranked = goal.with_columns(place=pl.col("mean").rank("ordinal", descending=True))
    arx = ranked.filter(pl.col("symbol") == "Arx")
    if arx.is_empty():
        switch = "Arx: in the input of too few of the scanned cells for a test"
    else:
        row = arx.row(0, named=True)
        switch = (
            f"Arx, the known switch: place {row['place']:,} of {len(ranked):,} tested genes, "
            f"mean shift {row['mean']:.2e} ({row['ci_low']:.2e} to {row['ci_high']:.2e}), p {row['p_value']:.2g}, "
            f"in {row['n_cells']} cells"
        )
    return [
        f"corpus        {report['num_cells']:,} cells, {report['num_genes']:,} genes, {report['num_tokens']:,} tokens",
        f"pretraining   held-out loss {model['heldout_loss']:.3f}; "
        f"guessing by gene frequency {model['unigram_loss']:.3f}",
        f"cell types    on the test donor: accuracy {scored['accuracy']:.3f}, macro F1 {scored['macro_f1']:.3f}; "
        f"baseline (PCA, logistic regression) {baseline['accuracy']:.3f}, {baseline['macro_f1']:.3f}",
        f"tuning        best of {sum(tune['trials'].values())} settings: test accuracy {best['test_accuracy']:.3f}, "
        f"macro F1 {best['test_macro_f1']:.3f}",
        f"perturbation  alpha towards beta by deletion. {switch}",
    ]


if __name__ == "__main__":
    main()
