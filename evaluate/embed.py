"""`evaluate embed`: cells of a corpus as an AnnData file with embeddings and a UMAP."""

import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd

from corpus.errors import UserError
from corpus.hashing import digest_json
from corpus.provenance import record_run
from corpus.reader import Corpus
from evaluate.commands import EmbedCommand
from evaluate.encode import EncodeJob, num_layers, open_inputs, row_group_tasks
from evaluate.outputs import OutputFile
from evaluate.pipeline import encode_groups
from evaluate.settings import UmapSettings
from train.model_folder import LoadedModel
from train.tasks import corpus_identity

EMBEDDING, UMAP = "X_geneformer", "X_umap"
_ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}  # how AnnData marks a dense array in HDF5


def embed(settings: EmbedCommand) -> str:
    """Write the AnnData file, unless the same run has written it.

    Cells come in corpus order; the embeddings go to disk row group by row group.

    Returns
    -------
    One line on what was done.

    Raises
    ------
    UserError
        If an input is missing or does not fit the other, or `out` is taken by something else.
    """
    target = OutputFile(settings.out, ".h5ad")
    corpus, loaded = open_inputs(settings.corpus, settings.model)
    num_layers(loaded, settings.readout)
    run_hash = digest_json(
        {
            "corpus": corpus_identity(corpus),
            "model": loaded.checksum,
            "settings": settings.model_dump(mode="json", include={"max_cells", "seed", "readout", "umap"}),
        },
        16,
    )
    if target.exists() and not settings.overwrite:
        if _run_hash_of(target) == run_hash:
            return f"{target}: already written with these settings and inputs; nothing to do"
        raise UserError(f"{target}: exists, and was made otherwise; choose another --out, or give --overwrite")
    cells = None
    if settings.max_cells is not None and settings.max_cells < len(corpus):
        cells = np.sort(np.random.default_rng(settings.seed).choice(len(corpus), settings.max_cells, replace=False))
    with target.writing() as part:
        _write(part, settings, corpus, loaded, cells, run_hash)
    record_run(
        target.folder,
        "evaluate embed",
        settings,
        {"corpus": digest_json(corpus_identity(corpus)), "genes": corpus.manifest.genes_hash, "model": loaded.checksum},
    )
    number = len(corpus) if cells is None else len(cells)
    return f"{target}: {number:,} of {len(corpus):,} cells"


def _write(
    path: Path, settings: EmbedCommand, corpus: Corpus, loaded: LoadedModel, cells: np.ndarray | None, run_hash: str
) -> None:
    number = len(corpus) if cells is None else len(cells)
    facts = _facts(settings, corpus, loaded, number) | {"run_hash": run_hash}
    with warnings.catch_warnings():
        # anndata 0.12 speaks of its next release's string type, which changes nothing here.
        warnings.simplefilter("ignore", FutureWarning)
        anndata.AnnData(obs=obs_frame(corpus, cells), uns={"geneformer": facts}).write_h5ad(path)
    job = EncodeJob(
        settings.corpus,
        corpus.manifest.number,
        settings.model,
        "embedding",
        settings.readout,
        settings.workers.token_budget,
    )
    width = int(loaded.model.config.hidden_size)
    starts = corpus.row_group_offsets if cells is None else np.searchsorted(cells, corpus.row_group_offsets)
    with h5py.File(path, "r+") as file:
        obsm = file.require_group("obsm")
        rows = max(1, min(number, 1024))
        embedding = obsm.create_dataset(EMBEDDING, (number, width), np.float32, chunks=(rows, width))
        embedding.attrs.update(_ARRAY)
        for group, values in encode_groups(job, row_group_tasks(corpus, cells), settings.workers, corpus, loaded):
            embedding[starts[group] : starts[group] + len(values)] = values
        if settings.umap.enabled and number > 2:
            points = layout(embedding[:], settings.umap, settings.seed)
            obsm.create_dataset(UMAP, data=points).attrs.update(_ARRAY)


def obs_frame(corpus: Corpus, cells: np.ndarray | None = None) -> pd.DataFrame:
    """Labels of the wanted cells (all by default), text as categories, cell ids as the index."""
    columns = ["dataset_id", *corpus.manifest.obs_columns, "n_counts", "n_genes", "mito_fraction", "length"]
    table = corpus.obs(["cell_id", *columns])
    if cells is not None:
        table = table[cells]
    frame = pd.DataFrame(index=pd.Index(table["cell_id"].to_list(), name="cell_id", dtype=object))
    for name in columns:
        column = table[name]
        if column.dtype.is_numeric():
            frame[name] = column.to_numpy()
        else:
            labels = sorted(column.drop_nulls().unique().to_list())
            frame[name] = pd.Categorical(column.to_list(), categories=pd.Index(labels, dtype=object))
    return frame


def _facts(settings: EmbedCommand, corpus: Corpus, loaded: LoadedModel, number: int) -> dict[str, Any]:
    """What the embedding is of, for `uns`."""
    return {
        "corpus": settings.corpus,
        "corpus_manifest": corpus.manifest.number,
        "corpus_cells": len(corpus),
        "cells": number,
        "genes_hash": corpus.manifest.genes_hash,
        "model": settings.model,
        "model_kind": loaded.card.kind,
        "model_checksum": loaded.checksum,
        "special_tokens": loaded.card.special_tokens,
        "max_length": loaded.card.max_length,
        "layer": settings.readout.layer,
        "layers_run": num_layers(loaded, settings.readout),
        "embedding": settings.readout.embedding,
        "precision": settings.readout.precision,
        "seed": settings.seed,
        "umap": settings.umap.model_dump(),
    }


def layout(embedding: np.ndarray, settings: UmapSettings, seed: int) -> np.ndarray:
    """UMAP of an embedding; the same input and seed give the same picture.

    Parameters
    ----------
    embedding
        float32[cells, d], at least three cells.

    Returns
    -------
    float32[cells, 2].
    """
    with warnings.catch_warnings():
        # Its parametric sister, not used here, wants TensorFlow.
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        import umap  # heavy, and not needed by the other verbs
    number = len(embedding)
    sample = np.arange(number)
    if number > settings.max_fit_cells:
        sample = np.sort(np.random.default_rng(seed).choice(number, settings.max_fit_cells, replace=False))
    mapper = umap.UMAP(
        n_neighbors=min(settings.neighbors, len(sample) - 1),
        min_dist=settings.min_dist,
        metric=settings.metric,
        # A spectral start needs more cells than it takes eigenvectors.
        init="spectral" if len(sample) > 10 else "random",
        random_state=seed,
        n_jobs=1,
    )
    with warnings.catch_warnings():
        # On data that fall into separate islands UMAP warns that it lays them out one by one.
        warnings.simplefilter("ignore", UserWarning)
        points = np.asarray(mapper.fit_transform(embedding[sample]), dtype=np.float32)
        if len(sample) == number:
            return points
        out = np.empty((number, 2), dtype=np.float32)
        out[sample] = points
        rest = np.setdiff1d(np.arange(number), sample)
        for part in np.array_split(rest, len(rest) // settings.max_fit_cells + 1):
            out[part] = mapper.transform(embedding[part])
    return out


def _run_hash_of(target: OutputFile) -> str | None:
    """Which run wrote a file; None if it was not one of ours."""
    try:
        with target.local_copy() as path, h5py.File(path, "r") as file:
            value = file["uns/geneformer/run_hash"][()]
    except (OSError, KeyError):
        return None
    return value.decode() if isinstance(value, bytes) else str(value)
