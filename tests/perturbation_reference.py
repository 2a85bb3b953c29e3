"""What perturbation scans are held against: stock transformers on one sequence at a time, and edits of Python lists."""

from functools import cache

import numpy as np
import torch
from transformers import BertModel

CLS, EOS = 2, 3


def stock(net, special_tokens, layer=-1, dtype=torch.float32):
    """Stock encoder with the weights of one of our models.

    Returns
    -------
    A function of a list of genes to the hidden state of each, by gene, and the hidden state of the first token.
    """
    bert = BertModel(net.config, add_pooling_layer=False)
    bert.load_state_dict({name: value for name, value in net.bert.state_dict().items() if "pooler" not in name})
    bert.to(dtype).eval()

    @cache
    def states(genes):
        ids = [CLS, *genes, EOS] if special_tokens == "cls_eos" else list(genes)
        with torch.no_grad():
            out = bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].double().numpy()
        inner = out[1:-1] if special_tokens == "cls_eos" else out
        return dict(zip(genes, inner, strict=True)), out[0]

    return lambda genes: states(tuple(genes))


def edited(settings, cell, counts, medians, genes, limit):
    """The definition of each perturbation in lists; None where it does not apply to the cell."""
    source = cell if settings.edit == "before_truncation" else cell[:limit]
    count_of = dict(zip(cell, counts, strict=True))
    inside = [gene in cell[:limit] for gene in genes]
    rest = [gene for gene in source if gene not in genes]
    if settings.kind == "delete":
        wanted = all(inside) if settings.require == "all" else any(inside)
        return rest[:limit] if wanted else None
    if settings.kind == "overexpress":
        return (list(genes) + rest)[:limit] if settings.absent == "insert" or all(inside) else None
    if settings.kind == "knock_in":
        return (rest[: settings.rank] + list(genes) + rest[settings.rank :])[:limit]
    if not all(inside):
        return None
    if settings.fold_change is not None:
        new = {gene: count_of[gene] * (settings.fold_change if gene in genes else 1) for gene in source}
        return sorted(source, key=lambda gene: (-(new[gene] / medians[gene]), gene))[:limit]
    (gene,) = genes
    place = source.index(gene) + (settings.rank_shift if settings.kind == "knockdown" else -settings.rank_shift)
    place = max(place, 0)
    return [*rest[:place], gene, *rest[place:]][:limit]


def cosine(a, b):
    """Cosine of two vectors."""
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def reference(run, original, perturbed, genes, centroids, embedding="mean"):
    """Similarity and shifts; None where the inputs share no unperturbed gene. Genes are paired by identity."""
    shared = [gene for gene in original if gene in perturbed and gene not in genes]
    if not shared:
        return None
    (before, before_first), (after, after_first) = run(original), run(perturbed)
    if embedding == "cls":
        x, y = after_first, before_first
    else:
        x = np.mean([after[gene] for gene in shared], axis=0)
        y = np.mean([before[gene] for gene in shared], axis=0)
    return [cosine(x, y), *(cosine(x, centroid) - cosine(y, centroid) for centroid in centroids)]


def gene_effects(run, original, perturbed, genes):
    """Cosine of each unperturbed shared gene's embedding after and before, by gene."""
    before, after = run(original)[0], run(perturbed)[0]
    shared = [gene for gene in original if gene in perturbed and gene not in genes]
    return {gene: cosine(after[gene], before[gene]) for gene in shared}


def published(run, original, genes, kind, whole_cell, limit, centroids, lineage):
    """One perturbation as the original compares it; None where it has nothing to compare.

    Rows of hidden states are lists here, dropped by place as the description says, without regard to which gene they
    belong to.

    Parameters
    ----------
    whole_cell
        Whether the genes are those of the cell, one at a time (else a list that is perturbed together).
    lineage
        "geneformer" or "geneformer_v2".
    """
    present = [gene for gene in genes if gene in original]
    absent = len(genes) - len(present)
    if kind == "delete":
        if absent:
            return None
        perturbed, moved = [gene for gene in original if gene not in genes], 0
    else:
        if whole_cell and original[0] == genes[0]:
            return None
        perturbed = ([*genes] + [gene for gene in original if gene not in genes])[:limit]
        moved = len(genes)
    states = run(original)[0]
    rows = [states[gene] for gene in original]
    own_places = [original.index(gene) for gene in present]
    after_rows = [run(perturbed)[0][gene] for gene in perturbed]
    if lineage == "geneformer":
        reference_rows = [row for place, row in enumerate(rows) if place not in own_places]
        reference_rows = reference_rows[: max(len(reference_rows) - absent, 0)]
        kept = after_rows[moved:]
        if not reference_rows:
            return None
        own = [cosine(x, y) for x, y in zip(kept, reference_rows, strict=False)]
        similarity = float(np.mean(own))
        after, before = np.mean(kept, axis=0), np.mean(reference_rows, axis=0)
        # After a deletion the gene at a place is called by the name of the one that was there before.
        names = original if kind == "delete" else perturbed[moved:]
        by_name = dict(zip(names, own, strict=False))
    else:
        grown = min(len(original) + absent, limit)
        overflow = max(grown + absent - limit, 0) if kind == "overexpress" else 0
        rows = rows[: len(rows) - overflow]
        reference_rows = [row for place, row in enumerate(rows) if place not in own_places]
        if not reference_rows:
            return None
        similarity = cosine(np.mean(after_rows[moved:], axis=0), np.mean(reference_rows, axis=0))
        after, before = np.mean(after_rows, axis=0), np.mean(rows, axis=0)
        by_name = {}
    shifts = [cosine(after, centroid) - cosine(before, centroid) for centroid in centroids]
    return [similarity, *shifts], by_name
