"""`evaluate report`: one HTML page, complete in itself, from the files that the other commands wrote."""

import json
from datetime import UTC, datetime
from typing import Any

from corpus.errors import UserError
from corpus.provenance import record_run
from corpus.store import Store
from evaluate.commands import ReportCommand
from evaluate.outputs import OutputFile
from evaluate.page import Block, Details, Note, Section, Table, Text, not_run, render
from evaluate.report_inputs import read_json, run_records
from evaluate.section_corpus import corpus_section
from evaluate.section_embedding import embedding_section
from evaluate.section_perturbation import perturbation_section
from evaluate.section_screen import screen_section
from evaluate.section_training import classification_section, pretrain_section, tune_section

_INPUTS = ("corpus", "pretrain", "classifier", "tune", "embedding", "classify", "perturb", "stats", "screen")


def write_report(settings: ReportCommand) -> str:
    """Write the page; parts that were not given appear as such.

    Returns
    -------
    Where it is.

    Raises
    ------
    UserError
        If a part was given that is not there or is broken; the message names the file.
    """
    target = OutputFile(settings.out, ".html")
    if all(getattr(settings, name) is None for name in _INPUTS):
        raise UserError(
            f"report: nothing to report on; give at least one of {', '.join('--' + name for name in _INPUTS)}"
        )
    sections = build_sections(settings)
    created = f"Created {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    page = render(settings.title, created, sections)
    with target.writing() as part:
        part.write_text(page, encoding="utf-8")
    record_run(target.folder, "evaluate report", settings, {})
    return f"{target}: {len(page) / 1e6:.1f} MB"


def build_sections(settings: ReportCommand) -> list[Section]:
    """Make all sections, in the order of the page."""
    model = settings.pretrain or settings.classifier
    max_length = None if model is None else _input_genes(Store(model))
    sections = [
        corpus_section(settings.corpus, max_length) if settings.corpus else not_run("corpus", "Corpus", "`ingest run`"),
        pretrain_section(settings.pretrain)
        if settings.pretrain
        else not_run("pretraining", "Pretraining", "`train pretrain`"),
        classification_section(settings.classifier, settings.classify),
        tune_section(settings.tune) if settings.tune else not_run("tuning", "Tuning", "`tune run`"),
        embedding_section(settings.embedding)
        if settings.embedding
        else not_run("embedding", "Embedding", "`evaluate embed`"),
        perturbation_section(settings.perturb, settings.stats, settings.named_genes, settings.top_genes, settings.maps),
    ]
    if settings.screen:
        sections.append(screen_section(settings.screen, settings.top_genes))
    return [*sections, _caveats(sections), _appendix(settings)]


def _input_genes(store: Store) -> int | None:
    """Genes that a model takes in."""
    card = read_json(store, "card.json")
    length = card.get("max_length")
    return None if length is None else int(length) - (2 if card.get("special_tokens") == "cls_eos" else 0)


def _caveats(sections: list[Section]) -> Section:
    """What the numbers do not say."""
    general = [
        "Intervals of accuracies treat test cells as independent. With few donors the true uncertainty about a new "
        "donor is larger.",
        "Cell-type labels are the sources' own; a disagreement may be the label's fault.",
    ]
    texts = [*general, *(text for section in sections for text in section.caveats)]
    return Section("caveats", "Caveats", [Text(text) for text in texts])


def _appendix(settings: ReportCommand) -> Section:
    """Which run made which part: settings, versions, commit."""
    records: list[tuple[str, dict[str, Any]]] = []
    lacking = []
    for name in _INPUTS:
        uri = getattr(settings, name)
        if uri is None:
            continue
        if name == "embedding":
            target = OutputFile(uri, ".h5ad")
            found = run_records(target.folder, out=str(target))
        else:
            found = run_records(Store(uri))
        records += [(name, record) for record in found]
        if not found:
            lacking.append(name)
    rows = [
        [part, record.get("command"), record.get("started"), _commit(record), record.get("python"), *_versions(record)]
        for part, record in records
    ]
    columns = ["part", "command", "started", "git commit", "Python", "ray", "torch", "deepspeed"]
    blocks: list[Block] = [Table(columns, rows, "Runs, as recorded beside their outputs.")] if rows else []
    if lacking:
        blocks.append(Note(f"No record of the run beside: {', '.join(lacking)}."))
    blocks += [
        Details(
            f"{record.get('command')}, {record.get('started')}: settings, versions, inputs",
            json.dumps(record, indent=1),
        )
        for _, record in records
    ]
    return Section("appendix", "Settings and versions", blocks)


def _commit(record: dict[str, Any]) -> str:
    commit = record.get("git_commit")
    if not commit:
        return "unknown"
    return str(commit)[:12] + ("-dirty" if str(commit).endswith("-dirty") else "")


def _versions(record: dict[str, Any]) -> list[str | None]:
    versions = record.get("versions", {})
    return [versions.get(name) for name in ("ray", "torch", "deepspeed")]
