"""Settings of pretraining and fine-tuning. Groups that cannot change the result are left out of a run's identity."""

from typing import Any, Literal

from pydantic import Field, model_validator

from corpus.hashing import digest_json
from corpus.settings import Settings, Uri
from train.model import Pooling
from train.presets import ModelSettings

Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "fp32", "bf16"]


class BatchSettings(Settings):
    """How cells become steps."""

    token_budget: int = Field(16_384, ge=1)
    """Most tokens in one micro-batch of one worker; a step has this many times workers times accumulation."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches of one worker in one step."""
    window_row_groups: int = Field(16, ge=1)
    """Row groups (of about 1,024 cells) that are read and shuffled together."""


class OptimizerSettings(Settings):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) and its learning rate."""

    learning_rate: float = Field(1e-3, gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    schedule: Schedule = "linear"
    """How it falls after the warm-up: to zero in a line, to zero along a cosine, or not at all."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the training in which the learning rate rises from zero."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of matrices; biases and layer norms have none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 for no clipping."""


class EngineSettings(Settings):
    """DeepSpeed."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """Partitioned over the workers: 0 nothing, 1 optimiser states, 2 gradients as well, 3 parameters as well. "auto"
    goes by the model's size (docs/training.md)."""
    offload_optimizer: bool = False
    """Keep the optimiser states in the host's memory and update there; needs stage 1 or higher."""
    precision: Precision = "auto"
    """Precision of matrix products; weights stay in float32. "auto" is bf16 on a GPU that has it, else fp32."""
    deepspeed_json: Uri | None = None
    """A JSON file of DeepSpeed settings, laid over those made from ours."""


class WorkerSettings(Settings):
    """Who trains. None of this changes the result, save for the number of workers, which a checkpoint records."""

    count: int = Field(1, ge=1)
    """Workers, one for each GPU or group of CPU cores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes GPUs if the cluster has as many as there are workers."""
    cpus: float = Field(1, gt=0)
    """CPUs that Ray reserves for each worker."""
    max_failures: int = Field(3, ge=0)
    """How often a run starts again from its newest checkpoint after a worker has died."""
    reader_threads: int = Field(2, ge=1)
    """Threads of each worker that read, mask and pack the coming batches."""
    cache: Uri | None = None
    """Folder on each machine for copies of a remote corpus's shards, each read over the network once."""
    cache_gb: float = Field(100, gt=0)
    """Most that the copies may take, in 10^9 bytes; shards that do not fit are read where they lie."""
    timeout_s: float = Field(1800, gt=0)
    """Seconds without a sign of a worker, or of progress, after which it is named and the attempt ends."""


class KeepSettings(Settings):
    """When to save and to log. None of this changes the result."""

    checkpoint_minutes: float = Field(10, ge=0)
    """Minutes between checkpoints; there is one at the end of each epoch as well."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints, besides those by time."""
    checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    failed_checkpoints: int = Field(3, ge=1)
    """Checkpoints in a row that may fail to be written (a full disk, an unreachable store) before the run ends."""
    log_steps: int = Field(10, ge=1)
    """Steps between records in metrics.jsonl and TensorBoard."""
    progress_s: float = Field(5, ge=0)
    """Seconds between progress lines."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one worker's device in TFLOP/s, for the MFU figure; known by name for common GPUs in bf16."""


class HeldOutSettings(Settings):
    """Cells that pretraining does not see."""

    fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the cells."""
    by: Literal["auto", "donor", "dataset", "cell"] = "auto"
    """What is held out as a whole. "auto" takes donors if some of them make up about the wanted share, else cells."""
    max_cells: int = Field(10_000, ge=1)
    """Most held-out cells that an evaluation runs on; the others are still kept from training."""


class TrainingOptions(Settings):
    """What every training has."""

    seed: int = Field(0, ge=0)
    """Of initialisation, splits, order of cells, masks and dropout."""
    epochs: int = Field(1, ge=1)
    """Passes over the training cells."""
    batches: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    engine: EngineSettings = EngineSettings()
    workers: WorkerSettings = WorkerSettings()
    keep: KeepSettings = KeepSettings()

    def identity(self) -> dict[str, Any]:
        """Settings that a result depends on; inputs are told by their content hashes, not by where they lie."""
        places = {"corpus", "out", "init_from"} | (
            {"model"} if isinstance(getattr(self, "model", None), str) else set()
        )
        return self.model_dump(mode="json", exclude={"workers", "keep"} | places)


class PretrainSettings(TrainingOptions):
    """Masked-gene pretraining, of a new model or of an existing one."""

    corpus: Uri
    """URI of the corpus."""
    out: Uri
    """URI of the model folder to write."""
    init_from: Uri | None = None
    """Go on from the weights in this folder, ours or a published one (config.json and model.safetensors or
    pytorch_model.bin); the optimiser and the schedule begin anew. Its sizes count, not the preset's."""
    model: ModelSettings = ModelSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    mask_probability: float = Field(0.15, gt=0, lt=1)
    """Share of a cell's genes that the model has to predict."""
    evaluate_steps: int | None = Field(None, ge=1)
    """Steps between evaluations on the held-out cells, besides the one at the end of each epoch."""


class SplitSettings(Settings):
    """Which cells train, which choose among models, and which only measure the chosen one."""

    by: Literal["auto", "donor", "cell"] = "auto"
    """"auto": whole donors where there are at least two. "cell" lets cells of a donor fall on both sides."""
    donor_column: str = "donor_id"
    """Column that, together with the dataset, names a donor."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the cells for choosing the epoch and the settings."""
    test: float = Field(0.1, gt=0, lt=1)
    """Share of the cells for the final measurement."""
    validation_donors: tuple[str, ...] = ()
    """Donors for validation, if they are to be chosen by hand."""
    test_donors: tuple[str, ...] = ()
    """Donors for testing, if they are to be chosen by hand."""

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> "SplitSettings":
        if self.validation + self.test >= 1:
            raise ValueError("validation and test shares leave nothing to train on")
        if self.validation_donors and not self.test_donors:
            raise ValueError("validation_donors without test_donors; name both, or neither")
        if both := sorted(set(self.validation_donors) & set(self.test_donors)):
            raise ValueError(f"donor {both[0]!r} is named for validation and for testing")
        return self


class FinetuneOptions(TrainingOptions):
    """Cell classification on top of a pretrained model."""

    epochs: int = Field(3, ge=1)
    """Passes over the training cells; the best one by validation macro F1 is kept."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=5e-5)
    label: str = "cell_type"
    """Column with the classes."""
    min_cells: int = Field(10, ge=1)
    """Classes with fewer cells are left out, and counted."""
    pooling: Pooling | None = None
    """What the classifier sees: "mean" of the genes, "first" token, or "cls"; by default <cls> if the model has it."""
    freeze_layers: int = Field(0, ge=0)
    """Lowest layers that keep their pretrained weights; if any, the embeddings below them do too."""
    class_weights: Literal["none", "balanced"] = "none"
    """"balanced" weighs each cell by the inverse frequency of its class."""
    split: SplitSettings = SplitSettings()


class FinetuneSettings(FinetuneOptions):
    """Fine-tuning of one model."""

    corpus: Uri
    """URI of the labelled corpus."""
    model: Uri
    """URI of the pretrained model folder."""
    out: Uri
    """URI of the classifier folder to write."""


def settings_hash(identity: dict[str, Any]) -> str:
    """Name of a run: what a checkpoint and an output folder are compared by."""
    return digest_json(identity, 16)
