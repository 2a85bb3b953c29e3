"""A model on disk: config.json and model.safetensors, which stock transformers loads, card.json and the gene table.

`save_model` and `load_model` handle folders of our own. `load_pretrained_encoder` reads weights to start from, also
from published folders that hold only config.json and model.safetensors or pytorch_model.bin.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import safetensors.torch
import torch
from pydantic import Field, JsonValue, ValidationError, model_validator
from torch import Tensor
from transformers import BertConfig

from corpus.errors import UserError
from corpus.genes import GeneTable
from corpus.manifest import Record
from corpus.reader import Corpus
from corpus.store import Store
from train.model import Classifier, MaskedLM, Pooling
from train.packing import SpecialTokens
from train.weights import SAFETENSORS, check_fit, parse_config, parse_safetensors, read_weights

CARD, CONFIG = "card.json", "config.json"

_STOCK_CLASSES = {"masked_lm": "BertForMaskedLM", "classifier": "BertForSequenceClassification"}


class ModelCard(Record):
    """What the weights alone do not say.

    Parameters
    ----------
    kind
        Which head the model has.
    genes_hash
        Vocabulary that the model was trained on.
    special_tokens, max_length
        How a cell becomes a sequence; `max_length` counts special tokens.
    pooling
        How a classifier turns tokens into a cell; None for a masked-language model.
    label_map
        Label to class number, labels sorted and numbers 0, 1, ...; None for a masked-language model.
    preset
        Name of the preset that the size came from, if any.
    training
        Summary of the run: settings, steps, final losses.
    sha256
        Hashes of config.json and model.safetensors; filled in by `save_model`.
    """

    format_version: Literal[1] = 1
    kind: Literal["masked_lm", "classifier"]
    genes_hash: str
    special_tokens: SpecialTokens
    max_length: int = Field(gt=0)
    pooling: Pooling | None = None
    label_map: dict[str, int] | None = None
    preset: str | None = None
    training: dict[str, JsonValue] = {}
    sha256: dict[str, str] = {}

    @model_validator(mode="after")
    def _head_fits_kind(self) -> Self:
        if self.kind == "masked_lm":
            if self.pooling is not None or self.label_map is not None:
                raise ValueError("a masked_lm has neither pooling nor label_map")
            return self
        if self.pooling is None or not self.label_map:
            raise ValueError("a classifier needs pooling and label_map")
        if list(self.label_map.items()) != [(label, i) for i, label in enumerate(sorted(self.label_map))]:
            raise ValueError("label_map must list the labels in sorted order, numbered 0, 1, ...")
        if self.pooling == "cls" and self.special_tokens != "cls_eos":
            raise ValueError("pooling 'cls' needs special_tokens 'cls_eos'")
        return self


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, on the CPU, in evaluation mode.

    Parameters
    ----------
    model
        `MaskedLM` or `Classifier`, by `card.kind`; its encoder is `model.bert`.
    card, genes
        As saved.
    checksum
        SHA-256 of model.safetensors: names the model in results.
    """

    model: MaskedLM | Classifier
    card: ModelCard
    genes: GeneTable
    checksum: str


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights to start from.

    Parameters
    ----------
    config
        Of the checkpoint.
    tensors
        Under the names of `MaskedLM` and `Classifier`, float32.
    source
        The file that they came from.
    checksum
        SHA-256 of that file.
    """

    config: BertConfig
    tensors: dict[str, Tensor]
    source: str
    checksum: str

    def load_into(self, model: MaskedLM | Classifier) -> list[str]:
        """Copy the encoder, and whatever else of the model the checkpoint has, into a model.

        Returns
        -------
        Names of the parameters that keep their fresh initialisation (a new head's).

        Raises
        ------
        UserError
            If the checkpoint lacks a tensor of the encoder, or shapes differ: a model must never train from an encoder
            that was not loaded.
        """
        state = model.state_dict()
        encoder = [name for name in state if name.startswith("bert.") and not name.startswith("bert.pooler.")]
        # A classifier's own head belongs to other labels.
        usable = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("classifier.")}
        check_fit(state, usable, encoder, self.source)
        model.load_state_dict(usable, strict=False)
        return [name for name in state if name not in usable]


def label_numbers(labels: Iterable[str]) -> dict[str, int]:
    """Number the distinct labels in sorted order, for `ModelCard.label_map`."""
    return {label: number for number, label in enumerate(sorted(set(labels)))}


def save_model(
    folder: Path,
    model: MaskedLM | Classifier,
    card: ModelCard,
    genes: GeneTable,
    state_dict: dict[str, Tensor] | None = None,
) -> ModelCard:
    """Write a model folder; card.json comes last, so a folder that has it is complete.

    Parameters
    ----------
    folder
        Created if absent. An export that was cut short (no card.json) is replaced.
    model
        `MaskedLM` or `Classifier`, as the card says.
    card
        Without hashes.
    genes
        The vocabulary that `card.genes_hash` names.
    state_dict
        Full weights, where the module itself holds only a part of them (ZeRO stage 3).

    Returns
    -------
    The card as written, with hashes.

    Raises
    ------
    UserError
        If the folder holds a model already.
    ValueError
        If card, model and genes do not belong together.
    """
    store = Store(folder)
    if store.exists(CARD):
        raise UserError(f"{store.uri}: holds a model already; choose another folder")
    _check_parts(model, card, genes)
    weights = model.state_dict() if state_dict is None else state_dict
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    files = {
        CONFIG: _config_json(model.config, card),
        SAFETENSORS: safetensors.torch.save(plain, metadata={"format": "pt"}),  # stock transformers wants the format
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    genes.save(store)
    card = card.model_copy(update={"sha256": {name: _sha256(data) for name, data in files.items()}})
    store.create(CARD, card.to_json())
    return card


def load_model(uri: str | Path) -> LoadedModel:
    """Open a model folder of our own, local or on object storage, and verify it.

    Raises
    ------
    UserError
        Names the file that is missing, was changed since it was saved, or does not fit the others.
    """
    store = Store(uri)
    card = _read_card(store)
    config = parse_config(_read_verified(store, CONFIG, card), f"{store.uri}/{CONFIG}")
    if card.max_length > config.max_position_embeddings:
        raise UserError(
            f"{store.uri}/{CARD}: max_length {card.max_length} exceeds the {config.max_position_embeddings} positions "
            f"of {CONFIG}"
        )
    weights = parse_safetensors(_read_verified(store, SAFETENSORS, card), f"{store.uri}/{SAFETENSORS}")
    with torch.device("meta"):  # no memory, and no random numbers drawn, for weights that are replaced at once
        model = _build(config, card)
    expected = model.state_dict()
    check_fit(expected, weights, expected, f"{store.uri}/{SAFETENSORS}")
    model.load_state_dict(weights, assign=True)
    genes = GeneTable.load(store, f"genes/{card.genes_hash}.parquet")
    return LoadedModel(model.eval(), card, genes, card.sha256[SAFETENSORS])


def load_pretrained_encoder(uri: str | Path) -> PretrainedWeights:
    """Read weights to start from: a folder of our own, or a published one without card.json.

    Parameters
    ----------
    uri
        Folder with config.json and model.safetensors or pytorch_model.bin.

    Raises
    ------
    UserError
        If a file is missing, unreadable, or not of a BERT that we can run.
    """
    store = Store(uri)
    config = parse_config(store.read_bytes(CONFIG), f"{store.uri}/{CONFIG}")
    name, data, tensors = read_weights(store)
    checksum = _sha256(data)
    if store.exists(CARD) and _read_card(store).sha256.get(name) != checksum:
        raise UserError(f"{store.uri}/{name}: damaged or changed: its SHA-256 is not the one in {CARD}")
    return PretrainedWeights(config, tensors, f"{store.uri}/{name}", checksum)


def check_same_genes(card: ModelCard, corpus: Corpus) -> None:
    """Refuse a corpus whose vocabulary is not the model's.

    Raises
    ------
    UserError
        Names both hashes.
    """
    found = corpus.manifest.genes_hash
    if found != card.genes_hash:
        raise UserError(
            f"{corpus.store.uri}: its gene table is {found}, the model's is {card.genes_hash}: "
            "tokens would mean other genes; ingest the corpus with the vocabulary that the model was trained on "
            "(vocabulary.corpus, or the same vocabulary.dictionary)"
        )


def read_card(uri: str | Path) -> ModelCard | None:
    """Card of a folder of ours; None for a published folder, which has none."""
    store = Store(uri)
    return _read_card(store) if store.exists(CARD) else None


def _read_card(store: Store) -> ModelCard:
    if not store.exists(CARD):
        raise UserError(f"{store.uri}: no {CARD}: not a model folder of ours, or an export that was cut short")
    try:
        return ModelCard.model_validate_json(store.read_bytes(CARD))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{store.uri}/{CARD}: {key + ': ' if key else ''}{problem['msg']}") from error


def _read_verified(store: Store, name: str, card: ModelCard) -> bytes:
    data = store.read_bytes(name)
    if _sha256(data) != card.sha256.get(name):
        raise UserError(f"{store.uri}/{name}: damaged or changed: its SHA-256 is not the one in {CARD}")
    return data


def _build(config: BertConfig, card: ModelCard) -> MaskedLM | Classifier:
    if card.label_map is None or card.pooling is None:
        return MaskedLM(config)
    return Classifier(config, len(card.label_map), card.pooling)


def _check_parts(model: MaskedLM | Classifier, card: ModelCard, genes: GeneTable) -> None:
    if isinstance(model, Classifier) != (card.kind == "classifier"):
        raise ValueError(f"the card says {card.kind}, the model is a {type(model).__name__}")
    if isinstance(model, Classifier):
        if model.pooling != card.pooling:
            raise ValueError(f"the card says pooling {card.pooling}, the model has {model.pooling}")
        if model.config.num_labels != len(card.label_map or {}):
            raise ValueError(f"{len(card.label_map or {})} labels in the card, {model.config.num_labels} in the model")
    if card.genes_hash != genes.hash:
        raise ValueError(f"the card says genes {card.genes_hash}, the table is {genes.hash}")
    if model.config.vocab_size < genes.vocab_size:
        raise ValueError(f"{genes.vocab_size} tokens in the gene table, {model.config.vocab_size} in the model")


def _config_json(config: BertConfig, card: ModelCard) -> bytes:
    values = config.to_dict()
    values |= {"architectures": [_STOCK_CLASSES[card.kind]], "dtype": "float32"}
    if card.label_map is not None:
        values["id2label"] = {str(number): label for label, number in card.label_map.items()}
        values["label2id"] = card.label_map
    return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
