"""The model against stock transformers with the same weights, and that cells in a batch do not touch each other."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from corpus.errors import UserError
from corpus.reader import Cells
from train.attention import Limits, PaddedAttention, group_by_length, make_attention
from train.cross_entropy import linear_cross_entropy
from train.model import Classifier, MaskedLM, layer_count
from train.packing import Packed, pack
from train.pooling import mean_pool
from train.presets import ModelSettings

VOCAB_SIZE = 60
# Some share a rectangle with padding (40 and 38, 31 and 30), most do not.
RAGGED = [5, 31, 12, 30, 1, 20, 9, 40, 38, 31]


def make_config(**changes):
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        # Large enough for attention to be far from uniform: errors in it must show.
        "initializer_range": 0.3,
    }
    return BertConfig(**(sizes | changes))


def make_batch(lengths=RAGGED, special_tokens="none", max_length=64, seed=0) -> Packed:
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([rng.permutation(np.arange(4, VOCAB_SIZE))[:length] for length in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return pack(Cells(np.arange(len(lengths)), offsets, tokens.astype(np.uint16)), max_length, special_tokens)


def edited(packed, tokens) -> Packed:
    return Packed(tokens, packed.positions, packed.offsets, packed.gene_rows, packed.lengths, packed.special_tokens)


def padded(packed, values=None, fill=0):
    """A rectangle [B, L] of tokens (or other per-token values) and its attention mask."""
    values = packed.tokens if values is None else values
    shape = (len(packed), packed.max_length)
    rectangle = torch.full(shape, fill, dtype=values.dtype)
    mask = torch.arange(shape[1]) < torch.from_numpy(packed.lengths)[:, None]
    rectangle[mask] = values
    return rectangle, mask.long()


def randomise(model, seed=0):
    """Give every parameter, biases and norms included, values that leave a trace."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def masked_pair(**changes):
    config = make_config(**changes)
    ours = randomise(MaskedLM(config)).eval()
    stock = BertForMaskedLM(config).eval()
    missing, unexpected = stock.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}  # tied
    assert not unexpected
    stock.tie_weights()
    return ours, stock


def classifier_pair(pooling, num_labels=5, **changes):
    config = make_config(num_labels=num_labels, **changes)
    ours = randomise(Classifier(config, num_labels, pooling)).eval()
    stock = BertForSequenceClassification(config).eval()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu"])
@pytest.mark.parametrize("special_tokens", ["none", "cls_eos"])
def test_every_layer_equals_stock_on_a_padded_batch(activation, special_tokens):
    ours, stock = masked_pair(hidden_act=activation)
    packed = make_batch(special_tokens=special_tokens)
    tokens, mask = padded(packed)
    with torch.no_grad():
        expected = stock.bert(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        got = list(ours.bert.states(packed))
    assert len(got) == len(expected) == 4
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs[mask.bool()], atol=1e-5, rtol=0)


def test_hidden_states_equal_stock_one_cell_at_a_time_without_padding():
    ours, stock = masked_pair()
    packed = make_batch()
    with torch.no_grad():
        got = ours.bert(packed)
        for cell in range(len(packed)):
            rows = slice(*packed.offsets[cell : cell + 2].tolist())
            alone = stock.bert(input_ids=packed.tokens[None, rows]).last_hidden_state[0]
            torch.testing.assert_close(got[rows], alone, atol=1e-5, rtol=0)


def test_stopping_at_a_layer_gives_that_layer():
    ours, stock = masked_pair()
    packed = make_batch([17, 17])
    with torch.no_grad():
        expected = stock.bert(input_ids=packed.tokens.view(2, 17), output_hidden_states=True).hidden_states
        for depth in range(4):
            torch.testing.assert_close(
                ours.bert(packed, num_layers=depth), expected[depth].flatten(0, 1), atol=1e-5, rtol=0
            )
    with pytest.raises(ValueError, match="has 3 layers"):
        ours.bert(packed, num_layers=4)


def test_layers_have_names():
    assert layer_count("last", 6) == 6
    assert layer_count("second_to_last", 6) == 5
    with pytest.raises(UserError, match="'-1'"):
        layer_count("-1", 6)
    with pytest.raises(UserError, match="only 1"):
        layer_count("second_to_last", 1)


def test_loss_and_every_gradient_equal_stock():
    ours, stock = masked_pair()
    packed = make_batch()
    generator = torch.Generator().manual_seed(1)
    rows = torch.nonzero(torch.rand(len(packed.tokens), generator=generator) < 0.3)[:, 0]
    labels = torch.randint(4, VOCAB_SIZE, (len(rows),), generator=generator)
    tokens, mask = padded(packed)
    labels_all = torch.full_like(packed.tokens, -100)
    labels_all[rows] = labels
    labels_BL, _ = padded(packed, labels_all, fill=-100)

    output = stock(input_ids=tokens, attention_mask=mask, labels=labels_BL)
    output.loss.backward()
    loss, correct = ours.loss(packed, rows, labels)
    (loss / len(rows)).backward()

    torch.testing.assert_close(loss / len(rows), output.loss, atol=1e-5, rtol=1e-6)
    assert correct == (output.logits[labels_BL != -100].argmax(-1) == labels_BL[labels_BL != -100]).sum()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 1000])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_chunked_cross_entropy_equals_the_plain_one(rows_per_chunk, num_rows):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, requires_grad=True) for shape in [(num_rows, 8), (50, 8), (50,)]
    )
    labels = torch.randint(0, 50, (num_rows,), generator=generator)
    loss, correct = linear_cross_entropy(hidden, weight, bias, labels, max_logits=rows_per_chunk * 50)
    got = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    logits = F.linear(hidden, weight, bias)
    plain = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, plain)
    assert correct == (logits.argmax(-1) == labels).sum()
    for mine, theirs in zip(got, torch.autograd.grad(3 * plain, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, bias, labels)[0], plain)


def test_bf16_autocast_keeps_the_loss_in_float32_and_close():
    ours, _ = masked_pair(initializer_range=0.05)
    packed = make_batch()
    rows = torch.arange(0, len(packed.tokens), 4)
    labels = packed.tokens[rows]
    exact, _ = ours.loss(packed, rows, labels)
    exact_grads = torch.autograd.grad(exact, list(ours.parameters()), allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = ours.loss(packed, rows, labels)
    grads = torch.autograd.grad(loss, list(ours.parameters()), allow_unused=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for (name, parameter), mine, theirs in zip(ours.named_parameters(), grads, exact_grads, strict=True):
        assert mine.dtype == parameter.dtype == torch.float32, name
        if name.endswith("key.bias"):  # its true gradient is 0: softmax does not see a shift common to all keys
            continue
        assert F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize(
    ("preset", "vocab_size", "expected"),
    [("mouse-6l", 56_084, 18_167_828), ("mouse-12l", 56_084, 21_330_452), ("mouse-6l", 25_426, 10_288_722)],
)
def test_parameter_counts_are_the_published_ones(preset, vocab_size, expected):
    config = ModelSettings(preset=preset).bert_config(vocab_size)
    with torch.device("meta"):
        ours, stock = MaskedLM(config), BertForMaskedLM(config)
    assert sum(parameter.numel() for parameter in ours.parameters()) == expected
    assert sum(parameter.numel() for parameter in stock.parameters()) == expected


def test_any_number_of_a_preset_can_be_overridden():
    config = ModelSettings(preset="mouse-6l", num_layers=3, activation="relu", dropout=0.1).bert_config(100)
    assert (config.num_hidden_layers, config.hidden_act, config.hidden_size) == (3, "relu", 256)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.02)
    with pytest.raises(ValueError, match="do not divide"):
        ModelSettings(preset="tiny", num_heads=7)


def test_fresh_weights_are_drawn_as_stock_draws_them():
    torch.manual_seed(0)
    model = MaskedLM(make_config(vocab_size=4_000, initializer_range=0.02))
    words = model.bert.embeddings.word_embeddings.weight
    assert words[0].abs().max() == 0
    assert words[1:].std().item() == pytest.approx(0.02, rel=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all(), name


def test_editing_a_cell_changes_that_cell_alone():
    ours, _ = masked_pair()
    packed = make_batch()
    rows = slice(*packed.offsets[1:3].tolist())
    tokens = packed.tokens.clone()
    tokens[rows] = tokens[rows].flip(0)
    with torch.no_grad():
        before, after = ours.bert(packed), ours.bert(edited(packed, tokens))
    same = torch.ones(len(tokens), dtype=torch.bool)
    same[rows] = False
    assert torch.equal(before[same], after[same])
    assert (before[rows] - after[rows]).abs().amax(dim=1).min() > 1e-3


def test_the_last_token_influences_the_first():
    ours, _ = masked_pair()
    packed = make_batch([12])
    tokens = packed.tokens.clone()
    tokens[-1] = 4 if tokens[-1] != 4 else 5
    with torch.no_grad():
        change = (ours.bert(packed) - ours.bert(edited(packed, tokens)))[0].abs().max()
    assert change > 1e-3


def test_a_cell_alone_equals_the_cell_in_a_batch():
    ours, _ = masked_pair()
    packed = make_batch()
    with torch.no_grad():
        together = mean_pool(ours.bert(packed), packed)
        for cell, length in enumerate(RAGGED):
            rows = slice(*packed.offsets[cell : cell + 2].tolist())
            alone = pack(Cells(np.array([0]), np.array([0, length]), packed.tokens[rows].numpy()), 64)
            torch.testing.assert_close(mean_pool(ours.bert(alone), alone)[0], together[cell], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [RAGGED, [9, 9, 9]])
@pytest.mark.parametrize("special_tokens", ["none", "cls_eos"])
def test_mean_pool_averages_genes_alone_in_float32(lengths, special_tokens):
    packed = make_batch(lengths, special_tokens)
    hidden = torch.randn(len(packed.tokens), 16).bfloat16()
    got = mean_pool(hidden, packed)
    assert got.dtype == torch.float32
    skip = 0 if special_tokens == "none" else 1
    for cell, (a, b) in enumerate(zip(packed.offsets[:-1], packed.offsets[1:], strict=True)):
        expected = hidden[a + skip : b - skip].double().mean(0)
        torch.testing.assert_close(got[cell].double(), expected, atol=1e-6, rtol=1e-6)


def test_first_pooling_gives_the_logits_of_stock():
    ours, stock = classifier_pair("first")
    packed = make_batch()
    tokens, mask = padded(packed)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(packed), stock(input_ids=tokens, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
        )


def test_cls_pooling_gives_the_logits_of_stock_and_needs_cls():
    ours, stock = classifier_pair("cls")
    packed = make_batch(special_tokens="cls_eos")
    tokens, mask = padded(packed)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(packed), stock(input_ids=tokens, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
        )
    with pytest.raises(ValueError, match="<cls>"):
        ours.logits(make_batch())


def test_mean_pooling_puts_the_masked_mean_into_stock_pooler_and_head():
    ours, stock = classifier_pair("mean")
    packed = make_batch()
    tokens, mask = padded(packed)
    with torch.no_grad():
        hidden = stock.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        expected = stock.classifier(stock.bert.pooler(mean[:, None]))
        torch.testing.assert_close(ours.logits(packed), expected, atol=1e-5, rtol=1e-5)


def test_a_classifier_leaves_the_callers_config_alone():
    config = make_config()
    labels = config.num_labels
    assert Classifier(config, 7).config.num_labels == 7
    assert config.num_labels == labels


def test_dropout_acts_in_training_only_and_scales_attention_right():
    """The mean over many draws of attention with dropped weights is attention without."""
    packed = make_batch([6, 9, 9, 5])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(packed.tokens), 2, 8, generator=generator) for _ in range(3))
    exact = PaddedAttention(packed, 0.0)(q, k, v)
    attend = make_attention(packed, q.dtype, dropout=0.2)
    torch.manual_seed(0)
    draws = torch.stack([attend(q, k, v) for _ in range(4_000)])
    assert draws.std(0).min() > 0
    torch.testing.assert_close(draws.mean(0), exact, atol=5 * float(draws.std(0).max()) / 4_000**0.5, rtol=0)

    model = MaskedLM(make_config(attention_probs_dropout_prob=0.2))
    model.train()
    assert not torch.equal(model.bert(packed), model.bert(packed))
    model.eval()
    assert torch.equal(model.bert(packed), model.bert(packed))


def test_rectangles_cover_every_cell_once_within_their_limits():
    lengths = np.random.default_rng(0).integers(1, 400, 200)
    limits = Limits(min_fill=0.8, max_scores=400_000)
    groups = group_by_length(lengths, limits)
    assert sorted(np.concatenate(groups).tolist()) == list(range(200))
    for cells in groups:
        longest = lengths[cells].max()
        assert lengths[cells].min() >= 0.8 * longest
        assert len(cells) == 1 or len(cells) * longest**2 <= 400_000


@pytest.mark.parametrize("lengths", [[900, 890, 200, 900], [900] * 4])
def test_attention_cut_into_rectangles_for_dropout_is_exact(lengths):
    """A dropout too small to drop anything takes the path with explicit, and therefore bounded, scores."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    packed = pack(Cells(np.arange(4), offsets, np.full(offsets[-1], 7, np.uint16)), 900)
    attend = PaddedAttention(packed, 1e-12)
    assert len(attend.rectangles) == 4
    q, k, v = torch.randn(3, int(offsets[-1]), 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    got = attend(q, k, v)
    for a, b in itertools.pairwise(offsets):
        scores = torch.einsum("ihk,jhk->hij", q[a:b], k[a:b]) / 8**0.5
        expected = torch.einsum("hij,jhk->ihk", scores.softmax(-1), v[a:b])
        torch.testing.assert_close(got[a:b], expected, atol=1e-5, rtol=1e-5)


def test_a_kernel_that_cannot_do_it_is_refused_not_replaced():
    ours, _ = masked_pair()
    ours.bert.backend = "varlen"
    with pytest.raises(UserError, match="CUDA"):
        ours.bert(make_batch())


@pytest.mark.gpu
def test_the_variable_length_kernel_equals_padded_attention():
    packed = make_batch().to("cuda")
    q, k, v = (torch.randn(len(packed.tokens), 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    varlen = make_attention(packed, torch.bfloat16, 0.0, "varlen")(q, k, v)
    padded_out = make_attention(packed, torch.bfloat16, 0.0, "padded")(q, k, v)
    torch.testing.assert_close(varlen, padded_out, atol=0.02, rtol=0.02)
    with pytest.raises(UserError, match="no attention dropout"):
        make_attention(packed, torch.bfloat16, 0.02, "varlen")


def test_cells_longer_than_the_position_table_are_refused():
    ours, _ = masked_pair(max_position_embeddings=30)
    with pytest.raises(ValueError, match="40 tokens"):
        ours.bert(make_batch())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "sillu"}, "hidden_act 'sillu'"),
        ({"num_attention_heads": 5}, "does not divide"),
        ({"is_decoder": True}, "only encoders"),
        ({"tie_word_embeddings": False}, "tied"),
    ],
)
def test_a_configuration_that_would_run_wrongly_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        MaskedLM(make_config(**change))
