"""The verbs `embed`, `classify` and `report`. Imports wait until they run: torch would slow down `--help`."""

from pydantic import Field

from corpus.settings import Command, Uri
from evaluate.settings import BaselineSettings, EncoderSettings, ReadoutPrecision, UmapSettings, WorkerSettings


class EmbedCommand(Command):
    """Embed the cells of a corpus; write an AnnData file with X_geneformer, X_umap and the corpus's labels."""

    corpus: Uri
    """The corpus, a local folder or s3://..."""
    model: Uri
    """Model folder, pretrained or fine-tuned."""
    out: Uri
    """The .h5ad file to write."""
    overwrite: bool = False
    """Replace `out` if it holds something else."""
    max_cells: int | None = Field(None, ge=1)
    """Embed a random sample of this many cells instead of all; they stay in corpus order."""
    seed: int = 0
    """Of the sample and of the UMAP."""
    readout: EncoderSettings = EncoderSettings()
    umap: UmapSettings = UmapSettings()
    workers: WorkerSettings = WorkerSettings()

    def run(self) -> None:
        """Embed, and say what was written."""
        from evaluate.embed import embed

        print(embed(self))


class ClassifyCommand(Command):
    """Classify the cells of a corpus; where they have labels, score the test cells beside a baseline."""

    corpus: Uri
    """The corpus, a local folder or s3://..."""
    model: Uri
    """Classifier folder."""
    out: Uri
    """Folder for predictions.parquet, metrics.json and confusion.png."""
    label: str | None = None
    """Column with the true labels; by default the one that the classifier was trained on."""
    seed: int = 0
    """Of the baseline and of the bootstrap."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples for the intervals of accuracies."""
    precision: ReadoutPrecision = "float32"
    """Of the encoder."""
    baseline: BaselineSettings = BaselineSettings()
    workers: WorkerSettings = WorkerSettings()

    def run(self) -> None:
        """Classify, and print the figures that matter."""
        from evaluate.classify import classify

        print(classify(self))


class ReportCommand(Command):
    """Gather what was run into one HTML page that needs no network."""

    out: Uri
    """The .html file to write; an older one is replaced."""
    title: str = "Mouse-Geneformer report"
    """Heading of the page."""
    corpus: Uri | None = None
    """A corpus."""
    pretrain: Uri | None = None
    """Folder of a pretrained model."""
    classifier: Uri | None = None
    """Folder of a fine-tuned classifier."""
    classify: Uri | None = None
    """Output folder of `evaluate classify`."""
    tune: Uri | None = None
    """Output folder of `tune run`."""
    embedding: Uri | None = None
    """Output file of `evaluate embed`."""
    perturb: Uri | None = None
    """Output folder of `evaluate perturb`."""
    stats: Uri | None = None
    """Output folder of `evaluate stats`."""
    maps: list[Uri] = []
    """Output folders of `evaluate map`."""
    screen: Uri | None = None
    """Output folder of `evaluate screen`."""
    named_genes: list[str] = []
    """Genes (symbols or Ensembl ids) whose rank among all genes is reported, wherever they come."""
    top_genes: int = Field(20, ge=1, le=500)
    """Rows from each end of the table of genes."""

    def run(self) -> None:
        """Write the page."""
        from evaluate.report import write_report

        print(write_report(self))
