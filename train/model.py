"""BERT over packed cells. Parameters carry the names of stock transformers, so that a state dict is a checkpoint.

`MaskedLM` has the weights of `BertForMaskedLM`, `Classifier` those of `BertForSequenceClassification`. The tied decoder
weight is stored once, as stock transformers does. Architecture: Devlin et al., NAACL 2019 (arXiv:1810.04805).

Shape letters: T packed tokens, B cells, D hidden width, H heads, K width of a head, M masked rows, V vocabulary,
C classes.
"""

import copy
from collections import deque
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.activations import ACT2FN

from corpus.errors import UserError
from train.attention import Attend, Backend, make_attention
from train.cross_entropy import linear_cross_entropy
from train.packing import Packed
from train.pooling import first_pool, mean_pool

Pooling = Literal["mean", "first", "cls"]


def layer_count(name: str, num_hidden_layers: int) -> int:
    """Layers to run for the hidden states of a named layer.

    Parameters
    ----------
    name
        "last" or "second_to_last".
    num_hidden_layers
        Layers of the model.

    Raises
    ------
    UserError
        If there is no such name or no such layer.
    """
    counts = {"last": num_hidden_layers, "second_to_last": num_hidden_layers - 1}
    if name not in counts:
        raise UserError(f"layer {name!r}: expected one of {', '.join(counts)}")
    if counts[name] < 1:
        raise UserError(f"layer {name!r}: the model has only {num_hidden_layers} layer(s)")
    return counts[name]


def check_config(config: BertConfig) -> None:
    """Refuse a configuration that this forward pass would run wrongly.

    Raises
    ------
    UserError
        Names the key.
    """
    if config.hidden_act not in ACT2FN:
        raise UserError(f"config: hidden_act {config.hidden_act!r} is not an activation that transformers knows")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"config: num_attention_heads {config.num_attention_heads} does not divide hidden_size {config.hidden_size}"
        )
    if config.is_decoder or config.add_cross_attention:
        raise UserError("config: is_decoder or add_cross_attention is set; only encoders are supported")
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(f"config: position_embedding_type {kind!r} is not supported, only 'absolute'")
    if not config.tie_word_embeddings:
        raise UserError("config: tie_word_embeddings is false; only tied embeddings are supported")


class Embeddings(nn.Module):
    """Token, position and (constant) token-type embeddings, summed and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, packed: Packed) -> Tensor:
        """Embed a batch, float[T, D]."""
        token_type = packed.tokens.new_zeros(1)  # a cell is one segment
        summed_TD = (
            self.word_embeddings(packed.tokens)
            + self.token_type_embeddings(token_type)
            + self.position_embeddings(packed.positions)
        )
        out: Tensor = self.dropout(self.LayerNorm(summed_TD))
        return out


class SelfAttention(nn.Module):
    """Queries, keys and values of all heads."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_TD: Tensor, attend: Attend) -> Tensor:
        """Attend within cells, float[T, D]."""
        heads = (self.num_heads, -1)
        q_THK, k_THK, v_THK = (
            project(hidden_TD).unflatten(-1, heads) for project in (self.query, self.key, self.value)
        )
        return attend(q_THK, k_THK, v_THK).flatten(1)


class ResidualOutput(nn.Module):
    """Projection back to the hidden width, dropout, residual, layer norm (after the residual, as in BERT)."""

    def __init__(self, config: BertConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual_TD: Tensor) -> Tensor:
        """Map float[T, input_size] and the residual float[T, D] to float[T, D]."""
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual_TD)
        return out


class Layer(nn.Module):
    """Self-attention, then a feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config), "output": ResidualOutput(config, config.hidden_size)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = ResidualOutput(config, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_TD: Tensor, attend: Attend) -> Tensor:
        """Transform hidden states, float[T, D]."""
        attended_TD = self.attention["output"](self.attention["self"](hidden_TD, attend), hidden_TD)
        wide = self.activation(self.intermediate["dense"](attended_TD))
        out: Tensor = self.output(wide, attended_TD)
        return out


class Encoder(nn.Module):
    """Embeddings and layers; with `pooler`, also the dense layer that stock classifiers keep under that name.

    `backend` chooses the attention kernel and may be set at any time.
    """

    def __init__(self, config: BertConfig, pooler: bool = False) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.backend: Backend = "auto"
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        if pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.config.num_hidden_layers)

    def forward(self, packed: Packed, num_layers: int | None = None) -> Tensor:
        """Run the first `num_layers` layers (all by default; 0 gives the embeddings).

        Returns
        -------
        float[T, D].
        """
        (hidden_TD,) = deque(self.states(packed, num_layers), maxlen=1)
        return hidden_TD

    def states(self, packed: Packed, num_layers: int | None = None) -> Iterator[Tensor]:
        """Yield the embeddings, then the output of each of the first `num_layers` layers; float[T, D] each."""
        depth = self.num_layers if num_layers is None else num_layers
        if not 0 <= depth <= self.num_layers:
            raise ValueError(f"num_layers is {depth}; the model has {self.num_layers} layers")
        if packed.max_length > self.config.max_position_embeddings:
            raise ValueError(
                f"a cell has {packed.max_length} tokens; the model has {self.config.max_position_embeddings} positions"
            )
        hidden_TD = self.embeddings(packed)
        yield hidden_TD
        attend = make_attention(packed, _compute_dtype(hidden_TD), self._attention_dropout, self.backend)
        for layer in self.encoder["layer"][:depth]:  # type: ignore[index]
            hidden_TD = layer(hidden_TD, attend)
            yield hidden_TD

    @property
    def _attention_dropout(self) -> float:
        return float(self.config.attention_probs_dropout_prob) if self.training else 0.0


class MaskedLM(nn.Module):
    """Encoder with the masked-language-model head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.cls = nn.ModuleDict({"predictions": PredictionHead(config)})
        _initialise(self, config)

    def forward(self, packed: Packed, rows_M: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the genes at some rows; the head runs on those rows alone.

        Parameters
        ----------
        packed
            The batch, masked.
        rows_M
            int64[M]: rows of the batch to predict.
        labels_M
            int64[M]: the tokens that belong there.

        Returns
        -------
        loss: float32 scalar, sum (not mean) of the cross-entropies in nats; correct: int64 scalar.
        """
        hidden_MD = self.bert(packed)[rows_M]
        weight_VD = self.bert.embeddings.word_embeddings.weight
        loss, correct = self.cls["predictions"](hidden_MD, weight_VD, labels_M)
        return loss, correct

    def loss(self, packed: Packed, rows_M: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        """Call the module; see `forward`."""
        loss, correct = self(packed, rows_M, labels_M)
        return loss, correct


class PredictionHead(nn.Module):
    """Dense, activation, layer norm, and the word embeddings as the decoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.activation = ACT2FN[config.hidden_act]
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the loss over rows and count correct ones; see `MaskedLM.forward`."""
        transformed_MD = self.transform["LayerNorm"](self.activation(self.transform["dense"](hidden_MD)))
        return linear_cross_entropy(transformed_MD, weight_VD, self.bias, labels_M)


class Classifier(nn.Module):
    """Encoder, pooled to one vector per cell, with a classification head.

    Parameters
    ----------
    config
        Of the encoder; copied, so that the number of labels set here does not leak into the caller's.
    num_labels
        Classes.
    pooling
        What the head sees: "mean" of the genes' hidden states; "first", the first token's (the published models'
        behaviour: in a model without <cls> that is the top-ranked gene); "cls", the <cls> token's.
    """

    def __init__(self, config: BertConfig, num_labels: int, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.config.num_labels = num_labels
        self.pooling: Pooling = pooling
        self.bert = Encoder(self.config, pooler=True)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        _initialise(self, config)
        if pooling == "mean":
            # Means over hundreds of genes differ little from cell to cell: a random projection by small weights would
            # hide the differences, and training would begin with many steps in which only class frequencies are learnt.
            nn.init.eye_(self.bert.pooler["dense"].get_parameter("weight"))

    def forward(self, packed: Packed) -> Tensor:
        """Classify cells.

        Returns
        -------
        float[B, C]: logits.
        """
        pooled_BD = self._pool(self.bert(packed), packed)
        out: Tensor = self.classifier(self.dropout(torch.tanh(self.bert.pooler["dense"](pooled_BD))))
        return out

    def logits(self, packed: Packed) -> Tensor:
        """Call the module; see `forward`."""
        out: Tensor = self(packed)
        return out

    def _pool(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        if self.pooling == "mean":
            return mean_pool(hidden_TD, packed)
        if self.pooling == "cls" and packed.special_tokens != "cls_eos":
            raise ValueError("pooling 'cls' needs sequences with <cls>; this batch has none")
        return first_pool(hidden_TD, packed)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Precision in which linear layers run on these hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _initialise(model: nn.Module, config: BertConfig) -> None:
    """BERT's initialisation: normal weights, zero biases, a zero vector for padding."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
