"""Rewrite expected.json by the slow reading (`python -m tests.golden.make`), after a deliberate change of a rule."""

import json
from pathlib import Path

from tests.factories_ingest import SlowCorpus, Toy, slow_ingest

HERE = Path(__file__).resolve().parent
DATASET = "golden"


def slow_reading() -> SlowCorpus:
    """Ingest counts.csv (genes x cells) in plain Python."""
    header, *rows = [line.split(",") for line in (HERE / "counts.csv").read_text().splitlines()]
    matrix = [[int(row[i]) for row in rows] for i in range(1, len(header))]
    toy = Toy(HERE / "counts.csv", DATASET, header[1:], [row[0] for row in rows], matrix, [None] * len(matrix))
    return slow_ingest([toy])


def main() -> None:
    """Write a line for each gene and each cell, so that a change shows in a diff."""
    slow = slow_reading()
    medians = [f"  {json.dumps(gene)}: {slow.medians[gene]!r}" for gene in sorted(slow.medians)]
    cells = [f"  {json.dumps(name)}: {json.dumps(cell['order'])}" for name, cell in slow.cells.items()]
    text = '{\n "medians": {\n' + ",\n".join(medians) + '\n },\n "cells": {\n' + ",\n".join(cells) + "\n }\n}\n"
    (HERE / "expected.json").write_text(text)


if __name__ == "__main__":
    main()
