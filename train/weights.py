"""Weights and configuration of BERT checkpoints: reading the files, and the names that generations of them used."""

import io
import json
import pickle
from collections.abc import Collection, Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import BertConfig

from corpus.errors import UserError
from corpus.store import Store
from train.model import check_config

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"

_WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
_DECODER, _DECODER_BIAS, _HEAD_BIAS = (
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
    "cls.predictions.bias",
)


def parse_config(data: bytes, name: str) -> BertConfig:
    """Read a config.json.

    Parameters
    ----------
    data
        Content of the file.
    name
        The file, for messages.

    Raises
    ------
    UserError
        If it is not JSON, not of a BERT, or describes one that `train.model` cannot run.
    """
    try:
        values = json.loads(data)
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "bert":
        raise UserError(f"{name}: model_type is {kind!r}, expected 'bert'")
    try:
        config = BertConfig.from_dict(values)
        check_config(config)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error
    return config


def parse_safetensors(data: bytes, name: str) -> dict[str, Tensor]:
    """Read the content of a safetensors file; `name` is the file, for messages."""
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(f"{name}: not a readable safetensors file: {error}") from error


def read_weights(store: Store) -> tuple[str, bytes, dict[str, Tensor]]:
    """Read model.safetensors, or pytorch_model.bin where there is none.

    Returns
    -------
    Name of the file, its content, and its tensors under today's names (see `modernise`), in float32.
    """
    for name in (SAFETENSORS, PICKLED):
        if store.exists(name):
            data = store.read_bytes(name)
            where = f"{store.uri}/{name}"
            tensors = parse_safetensors(data, where) if name == SAFETENSORS else _parse_pickled(data, where)
            return name, data, modernise(tensors, where)
    raise UserError(f"{store.uri}: neither {SAFETENSORS} nor {PICKLED} in it")


def _parse_pickled(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        # weights_only: tensors and plain containers; anything else in the pickle is refused, not run.
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{name}: not a readable PyTorch weights file: {str(error).splitlines()[0]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{name}: expected a dictionary of tensors")
    return dict(found)


def modernise(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Bring a BERT state dict under today's names, each tied tensor once, in float32.

    Older files name layer norms gamma and beta, store position ids and the tied decoder; files of a bare encoder lack
    the prefix `bert.`.

    Raises
    ------
    UserError
        If the stored decoder differs from the word embeddings.
    """
    renamed = {}
    for key, tensor in tensors.items():
        if key.startswith(("embeddings.", "encoder.", "pooler.")):
            key = f"bert.{key}"
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if key != "bert.embeddings.position_ids" and not key.startswith("cls.seq_relationship."):
            renamed[key] = tensor.float()
    decoder = renamed.pop(_DECODER, None)
    if decoder is not None and not torch.equal(decoder, renamed.get(_WORD_EMBEDDINGS, decoder)):
        raise UserError(f"{name}: {_DECODER} differs from {_WORD_EMBEDDINGS}; only tied embeddings are supported")
    bias = renamed.pop(_DECODER_BIAS, None)
    if bias is not None:
        renamed.setdefault(_HEAD_BIAS, bias)
    return renamed


def check_fit(model: Mapping[str, Tensor], weights: Mapping[str, Tensor], required: Collection[str], name: str) -> None:
    """Check that weights can fill a model.

    Parameters
    ----------
    model
        Its state dict; only names and shapes matter.
    weights
        From the file.
    required
        Names that the file must have.
    name
        The file, for messages.

    Raises
    ------
    UserError
        Names a tensor that is missing, or has another shape than the model.
    """
    missing = [key for key in required if key not in weights]
    if missing:
        raise UserError(f"{name}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
    for key in weights.keys() & model.keys():
        if weights[key].shape != model[key].shape:
            raise UserError(
                f"{name}: {key} has shape {tuple(weights[key].shape)}, the model's configuration asks for "
                f"{tuple(model[key].shape)}"
            )
