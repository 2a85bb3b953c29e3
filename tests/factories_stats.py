"""Scans in files, made up from tables: what statistics read."""

import io

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from corpus.store import Store
from evaluate.gene_effects import gene_path, gene_schema
from evaluate.noise import NoiseFloor
from evaluate.shifts import ScanManifest, UnitRecord, shifts_schema, unit_path

STATES = ["alpha", "beta", "delta"]


def parquet(frame, schema):
    sink = io.BytesIO()
    pq.write_table(frame.select(schema.names).to_arrow().cast(schema), sink)
    return sink.getvalue()


def write_scan(
    folder,
    frame,
    *,
    joint=False,
    states=tuple(STATES),
    noise=None,
    rows_per_unit=301,
    genes="all",
    effects=None,
    model="model",
    null_lists=0,
    combine=None,
):
    """A finished scan of given rows, cut into units wherever it falls, also within a cell."""
    store, states = Store(folder), list(states)
    schema = shifts_schema([], states, [], joint)
    units = []
    for number, start in enumerate(range(0, len(frame), rows_per_unit)):
        part = frame[start : start + rows_per_unit]
        name, content = f"{number:032x}", {}
        store.create(unit_path(name), parquet(part, schema))
        if effects is not None:
            rows = effects.filter(pl.col("row").is_between(start, start + rows_per_unit - 1))
            store.create(gene_path(name), parquet(rows, gene_schema(joint)))
            content = {"gene_rows": len(rows), "gene_sha256": store.sha256(gene_path(name))}
        units.append(
            UnitRecord(unit_id=name, rows=len(part), skipped={}, sha256=store.sha256(unit_path(name)), **content)
        )
    measured = {"precision": "float32", "device": "cpu", "cells": 1, "perturbations": 1, "resolution": 0.0}
    measured |= {"error_shift": 0.0, "error_similarity": 0.0, "null_shift": 0.0, "null_similarity": 0.0}
    floor = None if noise is None else NoiseFloor(shift=noise, similarity=noise, probability=noise, **measured)
    ScanManifest(
        scan_id=f"scan of {model}",
        model_checksum=model,
        genes_hash="genes",
        corpus_sha256="corpus",
        settings={
            "perturbation": {
                "genes": genes,
                "combine": combine or ("joint" if joint else "one_by_one"),
                "null_lists": null_lists,
            }
        },
        perturbation="delete",
        joint=joint,
        states=states,
        state_cells=dict.fromkeys(states, 9),
        columns=[],
        num_cells=frame["cell_id"].n_unique(),
        rows=len(frame),
        skipped={},
        units=units,
        noise=floor,
        gene_shifts=effects is not None,
    ).publish(store)
    return str(folder)


def make_rows(seed=0, num_cells=45, num_genes=120, donors=4, states=tuple(STATES)):
    rng = np.random.default_rng(seed)
    cell, gene = np.nonzero(rng.random((num_cells, num_genes)) < np.linspace(0.3, 1, num_genes))
    frame = pl.DataFrame({"cell": cell, "gene": gene, "r": rng.random(len(cell))}).with_columns(
        (pl.col("r").rank("ordinal").over("cell").cast(pl.Int32) - 1).alias("rank")
    )
    size = np.exp(-frame["rank"].to_numpy() / 30)
    columns = {f"shift_{state}": 0.01 * size * (0.5 + rng.normal(size=len(cell))) for state in states}
    return frame.select(
        pl.format("c{}", "cell").alias("cell_id"),
        pl.format("d{}", pl.col("cell") % donors).alias("donor_id") if donors else pl.lit(None).alias("donor_id"),
        pl.lit("delete").alias("perturbation"),
        pl.format("g{}", pl.col("gene") + 1000).alias("ensembl_id"),
        pl.format("Gene{}", pl.col("gene") + 1000).alias("symbol"),
        "rank",
        pl.Series("similarity", 1 - 0.01 * size * rng.random(len(cell))),
        *(pl.Series(name, values.astype(np.float32)) for name, values in columns.items()),
        (pl.col("r") < 0.01).alias("no_op"),
    )
