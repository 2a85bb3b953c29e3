"""Sizes of a model by name, any number of which can be overridden."""

from typing import Literal, NamedTuple

from pydantic import Field, model_validator
from transformers import BertConfig

from corpus.schema import PAD
from corpus.settings import Settings
from train.packing import SpecialTokens

Activation = Literal["silu", "relu", "gelu"]
PresetName = Literal["tiny", "mouse-6l", "mouse-12l", "v2-104m"]


class Preset(NamedTuple):
    """Sizes of a published or built-in model; the fields are those of `ModelSettings`."""

    num_layers: int
    hidden_size: int
    num_heads: int
    feed_forward_size: int
    activation: Activation
    max_length: int
    special_tokens: SpecialTokens


PRESETS: dict[PresetName, Preset] = {
    # For the demo and the tests: the smallest model that learns something of a few thousand cells on a laptop.
    "tiny": Preset(2, 64, 2, 128, "silu", 512, "none"),
    # Ito et al., PLOS Genetics 21(3): e1011420 (2025): the base model and its deeper sister.
    "mouse-6l": Preset(6, 256, 4, 512, "silu", 2048, "none"),
    "mouse-12l": Preset(12, 256, 4, 512, "silu", 2048, "none"),
    # The 104 M parameter size of human Geneformer's second version.
    "v2-104m": Preset(12, 768, 12, 3072, "relu", 4096, "cls_eos"),
}


class ModelSettings(Settings):
    """Size of the model: a preset, and any number that is to differ from it."""

    preset: PresetName = "mouse-6l"
    """Where the numbers not given below come from."""
    num_layers: int | None = Field(None, ge=1)
    """Transformer layers."""
    hidden_size: int | None = Field(None, ge=1)
    """Width of a token's hidden state."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads; must divide the hidden size."""
    feed_forward_size: int | None = Field(None, ge=1)
    """Width inside the feed-forward block."""
    activation: Activation | None = None
    """Activation of the feed-forward block and of the language-model head."""
    max_length: int | None = Field(None, ge=3)
    """Longest sequence in tokens, special tokens included; longer cells lose their lowest ranks."""
    special_tokens: SpecialTokens | None = None
    """"none" as in the published mouse model, or "cls_eos": <cls> first and <eos> last."""
    dropout: float = Field(0.02, ge=0, lt=1)
    """Dropout of hidden states."""
    attention_dropout: float = Field(0.02, ge=0, lt=1)
    """Dropout of attention weights. At 0 a GPU in bf16 trains with the variable-length kernel, which has none."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        sizes = self.resolved()
        if sizes.hidden_size % sizes.num_heads:
            raise ValueError(f"{sizes.num_heads} heads do not divide a hidden size of {sizes.hidden_size}")
        return self

    def resolved(self) -> Preset:
        """Fill what was not given from the preset."""
        given = {name: getattr(self, name) for name in Preset._fields}
        return PRESETS[self.preset]._replace(**{name: value for name, value in given.items() if value is not None})

    def bert_config(self, vocab_size: int) -> BertConfig:
        """Build the Hugging Face configuration.

        Parameters
        ----------
        vocab_size
            `GeneTable.vocab_size`: genes and special tokens.
        """
        sizes = self.resolved()
        return BertConfig(
            vocab_size=vocab_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.feed_forward_size,
            hidden_act=sizes.activation,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            max_position_embeddings=sizes.max_length,
            type_vocab_size=2,
            initializer_range=0.02,
            layer_norm_eps=1e-12,
            pad_token_id=PAD,
        )
