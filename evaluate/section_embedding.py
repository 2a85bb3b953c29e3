"""Report section on embeddings: the UMAP, coloured by cell type and by donor."""

from typing import Any

import h5py
import numpy as np

from corpus.errors import UserError
from evaluate import plots
from evaluate.embed import EMBEDDING, UMAP
from evaluate.outputs import OutputFile
from evaluate.page import Block, Facts, Note, Picture, Pictures, Section

_MAX_POINTS = 50_000
_MAX_COMPARED = 5_000
_ALIKE = 0.999
_COLOURS = {"cell_type": "Cell type", "donor_id": "Donor", "dataset_id": "Dataset"}


def embedding_section(uri: str) -> Section:
    """Show an embedding.

    Raises
    ------
    UserError
        If the file is missing or was not written by `evaluate embed`.
    """
    target = OutputFile(uri, ".h5ad")
    if not target.exists():
        raise UserError(f"{target}: no such file")
    try:
        with target.local_copy() as path, h5py.File(path, "r") as file:
            number, width = file[f"obsm/{EMBEDDING}"].shape
            facts = {
                name: _scalar(item) for name, item in file["uns/geneformer"].items() if isinstance(item, h5py.Dataset)
            }
            points = file[f"obsm/{UMAP}"][:] if UMAP in file["obsm"] else None
            alike = likeness(file[f"obsm/{EMBEDDING}"][:: max(1, number // _MAX_COMPARED)])
            groups = {name: _labels(file["obs"], name) for name in _COLOURS}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{target}: not a file written by `evaluate embed`: {error}") from error
    shown = ("model", "model_kind", "model_checksum", "genes_hash", "layer", "embedding", "precision", "seed")
    about = [
        ("cells", number),
        ("dimensions", width),
        ("mean cosine between two cells", f"{alike:.6f}"),
        *((name.replace("_", " "), facts.get(name)) for name in shown),
    ]
    blocks: list[Block] = [Facts(about)]
    if alike > _ALIKE:
        blocks.append(
            Note(
                f"All cells have nearly the same embedding (mean cosine between two cells {alike:.6f}): the model has "
                "learned little that differs between cells, and what the picture shows may be their depth alone."
            )
        )
    if points is None:
        blocks.append(Note("No UMAP in this file: it was switched off when the cells were embedded."))
        return Section("embedding", "Embedding", blocks)
    chosen = np.arange(number)
    if number > _MAX_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(number, _MAX_POINTS, replace=False))
        blocks.append(Note(f"The pictures show a random {_MAX_POINTS:,} of the {number:,} cells."))
    pictures = []
    for name, title in _COLOURS.items():
        labels = groups[name]
        found = set() if labels is None else set(labels) - {None}
        if labels is None or not found or (name == "dataset_id" and len(found) < 2):
            continue
        drawing = plots.embedding_scatter(points[chosen], [labels[i] for i in chosen], title, named=name == "cell_type")
        pictures.append(Picture(drawing, f"UMAP of the cells, coloured by {title.lower()}"))
    if not pictures:
        drawing = plots.embedding_scatter(points[chosen], [None] * len(chosen), "Cells")
        pictures.append(Picture(drawing, "UMAP of the cells"))
        blocks.append(Note("The cells have no labels to colour them by."))
    blocks.append(Pictures(pictures))
    caveats = [
        "A UMAP keeps neighbourhoods, not distances: the size of a cluster and the gap between two clusters mean "
        "little. Cells that group by donor more than by type point to technical differences that the model has learned."
    ]
    return Section("embedding", "Embedding", blocks, caveats=caveats)


def likeness(embedding: np.ndarray) -> float:
    """Mean cosine between two different cells; NaN for a single one.

    Parameters
    ----------
    embedding
        float32[cells, d].
    """
    unit = embedding.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    number = len(unit)
    if number < 2:
        return float("nan")
    total = float(np.square(unit.sum(axis=0)).sum())
    return (total - float(np.square(unit).sum())) / (number * (number - 1))


def _labels(obs: Any, name: str) -> list[str | None] | None:
    """Read a categorical column as AnnData stores it; None if there is none."""
    if name not in obs or not isinstance(obs[name], h5py.Group):
        return None
    categories = [value.decode() if isinstance(value, bytes) else str(value) for value in obs[name]["categories"][:]]
    return [categories[code] if code >= 0 else None for code in obs[name]["codes"][:].tolist()]


def _scalar(item: Any) -> Any:
    value = item[()]
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if hasattr(value, "item") else value
