"""Where pretraining begins: weights drawn from the seed, or a checkpoint whose tokens mean the corpus's genes."""

from dataclasses import dataclass

from transformers import BertConfig

from corpus.errors import UserError
from corpus.genes import GeneTable
from corpus.reader import Corpus
from train.model_folder import PretrainedWeights, check_same_genes, load_pretrained_encoder, read_card
from train.packing import SpecialTokens
from train.presets import ModelSettings

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "feed_forward_size": "intermediate_size",
    "activation": "hidden_act",
}


@dataclass(frozen=True)
class Start:
    """The model before its first step.

    Parameters
    ----------
    weights
        To begin with; None for those drawn from the seed.
    """

    config: BertConfig
    max_length: int
    special_tokens: SpecialTokens
    weights: PretrainedWeights | None = None


def make_start(model: ModelSettings, corpus: Corpus, init_from: str | None) -> Start:
    """Decide on the model from the settings, or from a checkpoint.

    Parameters
    ----------
    model
        With `init_from` the preset does not count; sizes that are given must be the checkpoint's, a shorter
        `max_length` is possible, and dropout is taken from here.
    init_from
        Folder with config.json and model.safetensors or pytorch_model.bin: one of ours, or a published one.

    Raises
    ------
    UserError
        If the checkpoint's tokens may mean other genes than the corpus's, if sizes contradict each other, or if the
        vocabulary lacks the special tokens.
    """
    if init_from is None:
        sizes = model.resolved()
        start = Start(model.bert_config(corpus.genes.vocab_size), sizes.max_length, sizes.special_tokens)
    else:
        start = _from_checkpoint(model, corpus, init_from)
    check_special_tokens(corpus.genes, start.special_tokens, corpus.store.uri)
    return start


def check_special_tokens(genes: GeneTable, special_tokens: SpecialTokens, where: str) -> None:
    """Refuse to put <cls> and <eos> around cells of a vocabulary that has genes under those tokens.

    Raises
    ------
    UserError
        Names the gene.
    """
    for name in ("<cls>", "<eos>") if special_tokens == "cls_eos" else ():
        if name not in genes.special_tokens:
            raise UserError(
                f'{where}: special_tokens = "cls_eos", but the gene table {genes.hash} has no {name}: its first gene, '
                f'{genes.ensembl_ids[0]}, has token {genes.tokens[0]}; set model.special_tokens = "none"'
            )


def _from_checkpoint(model: ModelSettings, corpus: Corpus, uri: str) -> Start:
    weights = load_pretrained_encoder(uri)
    config = weights.config
    for ours, theirs in _SIZES.items():
        wanted, found = getattr(model, ours), getattr(config, theirs)
        if wanted is not None and wanted != found:
            raise UserError(f"model.{ours} = {wanted}, but {uri}/config.json has {theirs} = {found}; leave it out")
    max_length = model.max_length or config.max_position_embeddings
    if max_length > config.max_position_embeddings:
        raise UserError(f"model.max_length = {max_length}: {uri} has {config.max_position_embeddings} positions")
    card = read_card(uri)
    if card is not None:
        check_same_genes(card, corpus)
        special_tokens = model.special_tokens or card.special_tokens
        max_length = model.max_length or card.max_length
    else:
        _check_imported(config, corpus, uri)
        if model.special_tokens is None:
            raise UserError(
                f"{uri}: config.json does not say whether its cells begin with <cls> and end with <eos>: set "
                'model.special_tokens to "none" (Mouse-Geneformer, Geneformer V1) or "cls_eos" (Geneformer V2)'
            )
        special_tokens = model.special_tokens
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = model.dropout, model.attention_dropout
    return Start(config, max_length, special_tokens, weights)


def _check_imported(config: BertConfig, corpus: Corpus, uri: str) -> None:
    """A published folder does not say which genes its tokens are: only an imported vocabulary can be the same."""
    genes = corpus.genes
    how = "ingest the corpus with the checkpoint's dictionaries (vocabulary.dictionary, vocabulary.dictionary_medians)"
    if not genes.is_imported:
        raise UserError(
            f"{uri}: no card.json says which genes its {config.vocab_size:,} tokens are, and the gene table "
            f"{genes.hash} of {corpus.store.uri} is the corpus's own: its tokens mean other genes; {how}"
        )
    if genes.vocab_size > config.vocab_size:
        raise UserError(
            f"{uri}: has {config.vocab_size:,} tokens, the gene table {genes.hash} of {corpus.store.uri} has "
            f"{genes.vocab_size:,}: it is another dictionary; {how}"
        )
