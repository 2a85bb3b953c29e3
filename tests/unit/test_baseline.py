"""The baseline, the figures of merit, and their agreement with scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support

from corpus.reader import Cells, Corpus
from evaluate.baseline import fit_baseline, log_normalised, majority_class, run_baseline
from evaluate.metrics import accuracy_by_group, accuracy_difference, classification_metrics
from tests.factories import write_corpus
from train.scores import confusion_counts


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(write_corpus(tmp_path, num_cells=90, num_shards=3))


def classes_of(corpus: Corpus) -> np.ndarray:
    return np.arange(len(corpus)) % 3


def test_log_normalised_divides_by_all_counts_of_the_cell() -> None:
    cells = Cells(np.arange(2), np.array([0, 2, 3]), np.array([9, 4, 5], np.uint16), np.array([6, 2, 1], np.uint32))
    # The first cell has 20 UMIs of which 8 are in the vocabulary.
    matrix = log_normalised(cells, np.array([20, 1]), 12).toarray()
    expected = np.zeros((2, 12), np.float32)
    expected[0, 9], expected[0, 4], expected[1, 5] = np.log1p(3000), np.log1p(1000), np.log1p(10_000)
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)


def test_log_normalised_needs_counts() -> None:
    with pytest.raises(ValueError, match="without counts"):
        log_normalised(Cells(np.arange(1), np.array([0, 1]), np.array([4], np.uint16)), np.array([1]), 6)


def test_baseline_equals_a_dense_pca_with_the_same_classifier(corpus: Corpus) -> None:
    cells = corpus.read_cells(np.arange(len(corpus)), counts=True)
    matrix = log_normalised(cells, corpus.obs(["n_counts"])["n_counts"].to_numpy(), corpus.genes.vocab_size)
    baseline = fit_baseline(matrix[:60], classes_of(corpus)[:60], 8, seed=0)
    pca = PCA(8, svd_solver="full").fit(matrix[:60].toarray())
    direct = LogisticRegression(max_iter=2000).fit(pca.transform(matrix[:60].toarray()), classes_of(corpus)[:60])
    np.testing.assert_array_equal(baseline.predict(matrix), direct.predict(pca.transform(matrix.toarray())))
    np.testing.assert_allclose(baseline.pca.explained_variance_, pca.explained_variance_, rtol=1e-4)


def test_baseline_beats_the_majority_on_separable_cells(tmp_path: Path) -> None:
    corpus = Corpus(write_corpus(tmp_path, num_cells=240, lengths=(30, 60)))
    classes, cells = classes_of(corpus), np.arange(240)
    train, test = cells[cells % 2 == 0], cells[cells % 2 == 1]
    predicted, facts = run_baseline(corpus, train, classes[train], test, num_components=10)
    accuracy = (predicted == classes[test]).mean()
    assert accuracy > 0.9 > (majority_class(classes[train]) == classes[test]).mean()
    assert facts["train_cells"] == 120
    assert facts["converged"] is True


def test_baseline_does_not_see_the_test_cells(corpus: Corpus) -> None:
    """With shuffled labels there is nothing to learn but leakage."""
    classes = np.random.default_rng(0).permutation(classes_of(corpus))
    cells = np.arange(90)
    train, test = cells[:60], cells[60:]
    predicted, _ = run_baseline(corpus, train, classes[train], test, num_components=10)
    assert (predicted == classes[test]).mean() < 0.65


def test_a_sample_of_the_training_cells_is_told(corpus: Corpus) -> None:
    train = np.arange(60)
    _, facts = run_baseline(corpus, train, classes_of(corpus)[train], np.arange(60, 90), max_train_cells=30)
    assert (facts["train_cells"], facts["train_cells_available"]) == (30, 60)


def test_baseline_refuses_one_class() -> None:
    with pytest.raises(ValueError, match="two classes"):
        fit_baseline(sp.csr_matrix(np.eye(5)), np.zeros(5, np.int64), 2, seed=0)


def test_metrics_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 300)
    predicted = np.where(rng.random(300) < 0.6, truth, rng.integers(0, 4, 300))
    metrics = classification_metrics(truth, predicted, ["a", "b", "c", "d"])
    assert metrics["accuracy"] == pytest.approx((truth == predicted).mean())
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    expected = np.array(precision_recall_fscore_support(truth, predicted)).T
    found = [[row["precision"], row["recall"], row["f1"], row["support"]] for row in metrics["per_class"]]
    np.testing.assert_allclose(found, expected)
    low, high = metrics["accuracy_ci"]
    spread = 1.96 * np.sqrt(metrics["accuracy"] * (1 - metrics["accuracy"]) / 300)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)


def test_a_class_without_cells_counts_only_where_it_was_predicted() -> None:
    truth, predicted = np.array([0, 0, 1]), np.array([0, 2, 1])
    metrics = classification_metrics(truth, predicted, ["a", "b", "c", "d"])
    assert metrics["balanced_accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    absent = metrics["per_class"][2]
    assert (absent["support"], absent["predicted"], absent["f1"]) == (0, 1, None)


def test_confusion_has_the_truth_in_rows() -> None:
    counts = confusion_counts(np.array([0, 0, 1]), np.array([1, 0, 1]), 3)
    np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 1, 0], [0, 0, 0]])


def test_difference_is_paired() -> None:
    truth = np.zeros(1000, np.int64)
    first, second = truth.copy(), truth.copy()
    first[:500] = second[:490] = 1  # both wrong on the same cells, but for ten
    result = accuracy_difference(truth, first, second)
    assert result["accuracy"] == pytest.approx(-0.01)
    assert result["accuracy_ci"][1] < 0  # an unpaired interval would be five times as wide
    assert (result["only_first_right"], result["only_second_right"]) == (0, 10)


def test_accuracy_by_group_keeps_cells_without_a_group() -> None:
    rows = accuracy_by_group(np.array([0, 0, 1]), np.array([0, 1, 1]), ["d2", None, "d1"])
    assert [(row["group"], row["accuracy"]) for row in rows] == [("d1", 1.0), ("d2", 1.0), (None, 0.0)]


def test_majority_takes_the_lowest_of_equals() -> None:
    assert majority_class(np.array([2, 1, 2, 1])) == 1
