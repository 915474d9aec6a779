"""The metrics against scikit-learn's, on random scores with ties and on cases known by hand."""

import math
import warnings

import evaluate
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from scripts.evaluation import metrics
from scripts.evaluation.evaluate_metrics import AveragePrecision, evaluate_metric
from scripts.evaluation.metrics import METRICS, ScoredClips, compute_metrics


@st.composite
def scored_clips(draw, multi_label: bool):
    """Probabilities, many of them equal, and targets; some classes without positives."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_clips, num_labels = draw(st.integers(1, 30)), draw(st.integers(2, 6))
    steps = draw(st.sampled_from([2, 5, 1000]))
    scores = random.integers(0, steps + 1, (num_clips, num_labels)) / steps
    if multi_label:
        return scores, (random.random((num_clips, num_labels)) < draw(st.floats(0, 1))).astype(int)
    scores = (scores + 1e-3) / (scores + 1e-3).sum(axis=1, keepdims=True)
    return scores, random.integers(0, draw(st.integers(1, num_labels)), num_clips)


def by_scikit_learn(scores, targets, weights=None) -> dict[str, float]:
    """`compute_metrics` by scikit-learn, without classes that lack positives (or negatives)."""
    num_labels = scores.shape[1]
    is_multi_label = targets.ndim == 2
    relevant = targets if is_multi_label else np.eye(num_labels, dtype=int)[targets]
    if weights is None:
        weights = np.ones(len(scores))
    positives = weights @ relevant
    there = np.flatnonzero(positives)
    both = np.flatnonzero((positives > 0) & (positives < weights.sum()))

    def mean(function, classes):
        values = [
            function(relevant[:, label], scores[:, label], sample_weight=weights)
            for label in classes
        ]
        return np.mean(values) if values else math.nan

    roc_auc = mean(sklearn.metrics.roc_auc_score, both)
    decided = (scores >= 0.5).astype(int) if is_multi_label else scores.argmax(axis=1)
    f1 = math.nan
    if len(there):
        f1 = sklearn.metrics.f1_score(
            targets, decided, labels=there, average="macro", sample_weight=weights, zero_division=0
        )
    expected = {
        "macro_f1": f1,
        "mean_average_precision": mean(sklearn.metrics.average_precision_score, there),
        "roc_auc": roc_auc,
    }
    if not is_multi_label:
        expected["accuracy"] = sklearn.metrics.accuracy_score(
            targets, decided, sample_weight=weights
        )
    return expected


def check(values: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("multi_label", [False, True])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_scikit_learns(multi_label, data):
    scores, targets = data.draw(scored_clips(multi_label))
    measured = compute_metrics(scores, targets)
    expected = by_scikit_learn(scores, targets)
    check(measured, expected)
    assert set(measured) - set(expected) == {
        "d_prime",
        "expected_calibration_error",
        "classes_without_positives",
    }
    # Weights are repetitions; this is what the bootstrap measures.
    weights = np.random.default_rng(len(scores)).multinomial(
        len(scores), np.full(len(scores), 1 / len(scores))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighted = ScoredClips(scores, targets).metrics(weights)
    check(weighted, by_scikit_learn(scores, targets, weights))
    repeated = compute_metrics(scores.repeat(weights, axis=0), targets.repeat(weights, axis=0))
    check(repeated, weighted)


@settings(max_examples=30, deadline=None)
@given(scored_clips(multi_label=True))
def test_decisions_per_class_equal_scikit_learns(clips):
    scores, targets = clips
    precision, recall, f1 = ScoredClips(scores, targets).decisions()
    decided = (scores >= 0.5).astype(int)
    expected = sklearn.metrics.precision_recall_fscore_support(
        targets, decided, average=None, zero_division=np.nan
    )
    np.testing.assert_allclose(precision, expected[0])
    np.testing.assert_allclose(recall, expected[1])
    there = targets.any(axis=0)
    np.testing.assert_allclose(f1[there], expected[2][there])


@pytest.mark.parametrize("multi_label", [False, True])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_calibration_equals_scikit_learns_curve(multi_label, data):
    scores, targets = data.draw(scored_clips(multi_label))
    confidence = scores.ravel() if multi_label else scores.max(axis=1)
    right = targets.ravel() if multi_label else scores.argmax(axis=1) == targets
    share, mean = calibration_curve(right, confidence, n_bins=15)
    bins = np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidence)
    counts = np.bincount(bins)
    counts = counts[counts > 0]
    expected = (np.abs(share - mean) * counts).sum() / counts.sum()
    measured = ScoredClips(scores, targets).expected_calibration_error()
    assert measured == pytest.approx(expected, abs=1e-9)


def test_float32_scores_of_a_model():
    logits = np.random.default_rng(0).normal(size=(200, 20)).astype(np.float32)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = np.random.default_rng(1).integers(0, 20, 200)
    check(compute_metrics(scores, targets), by_scikit_learn(scores, targets))


def test_known_values():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    perfect = compute_metrics(scores, [0, 0, 1, 1])
    assert perfect["accuracy"] == perfect["macro_f1"] == perfect["mean_average_precision"] == 1
    assert perfect["roc_auc"] == 1
    assert perfect["d_prime"] == math.inf
    # Confidence 0.9, 0.8, 0.7, 0.6 and always right.
    assert perfect["expected_calibration_error"] == pytest.approx(0.25)
    assert compute_metrics(scores, [1, 1, 0, 0])["d_prime"] == -math.inf
    # Gong et al. report mAP 0.459 with d′ 2.78 or so; an AUC of 0.975 is 2.77.
    assert metrics.d_prime(0.975) == pytest.approx(2.772, abs=1e-3)
    assert metrics.d_prime(0.5) == pytest.approx(0)
    # One clip sure and wrong: nothing is further from calibrated.
    assert ScoredClips([[1.0, 0.0]], [1]).expected_calibration_error() == 1


@pytest.mark.parametrize(
    ("targets", "missing"), [([0, 2, 2], [1, 3]), (np.array([[1, 0, 0, 0]] * 3), [1, 2, 3])]
)
def test_classes_without_positives_are_left_out_and_named(targets, missing):
    scores = np.array([[0.5, 0.1, 0.4, 0.0], [0.3, 0.3, 0.4, 0.0], [0.7, 0.1, 0.1, 0.1]])
    assert compute_metrics(scores, targets)["classes_without_positives"] == len(missing)
    for name in ("macro_f1", "mean_average_precision", "roc_auc", "d_prime"):
        result = evaluate_metric(name).compute(predictions=scores, references=targets)
        assert result["classes_without_positives"] == missing
    per_class = AveragePrecision().compute(predictions=scores, references=targets)
    values = per_class["average_precision"]
    assert [label for label, value in enumerate(values) if value is None] == missing


def test_nothing_positive_is_nan():
    nothing = compute_metrics(np.full((3, 2), 0.2), np.zeros((3, 2), int))
    for name in ("macro_f1", "mean_average_precision", "roc_auc", "d_prime"):
        assert math.isnan(nothing[name]), name
    assert nothing["expected_calibration_error"] == pytest.approx(0.2)


@pytest.mark.parametrize("multi_label", [False, True])
def test_metric_classes_give_the_same(multi_label):
    random = np.random.default_rng(3)
    scores = random.dirichlet(np.ones(4), 40).astype(np.float32)
    targets = random.integers(0, 2, (40, 4)) if multi_label else random.integers(0, 4, 40)
    expected = compute_metrics(scores, targets)
    chosen = [evaluate_metric(name) for name in METRICS if name in expected]
    assert len(chosen) == (5 if multi_label else 6)
    for metric in [*chosen, AveragePrecision()]:
        result = metric.compute(predictions=scores, references=targets)
        metric.add_batch(predictions=scores[:15].tolist(), references=targets[:15].tolist())
        metric.add_batch(predictions=scores[15:].tolist(), references=targets[15:].tolist())
        assert metric.compute() == result
        check(expected, {name: v for name, v in result.items() if isinstance(v, float)})
    together = evaluate.combine(chosen).compute(predictions=scores, references=targets)
    assert together["roc_auc"] == pytest.approx(expected["roc_auc"])


def test_accuracy_takes_logits():
    logits = [[-4.0, 3.0], [9.0, 1.0], [0.0, -1.0]]
    result = evaluate_metric("accuracy").compute(predictions=logits, references=[1, 0, 1])
    assert result["accuracy"] == pytest.approx(2 / 3)


def test_confidence_intervals():
    random = np.random.default_rng(0)
    targets = random.integers(0, 3, 150)
    right = random.random(150) < 0.8
    scores = np.eye(3)[np.where(right, targets, (targets + 1) % 3)] * 0.7 + 0.1
    clips = ScoredClips(scores, targets)
    intervals = clips.confidence_intervals(resamples=400, seed=1)
    assert intervals == clips.confidence_intervals(resamples=400, seed=1)
    assert intervals != clips.confidence_intervals(resamples=400, seed=2)
    values = clips.metrics()
    assert set(intervals) == set(values)
    for name, (low, high) in intervals.items():
        assert low < high
        if name != "expected_calibration_error":  # resampling makes a calibration look worse
            assert low < values[name] < high
    # The normal approximation of a share of 150 clips: ±1.96 sqrt(p (1 - p) / 150).
    low, high = intervals["accuracy"]
    width = 2 * 1.96 * math.sqrt(values["accuracy"] * (1 - values["accuracy"]) / 150)
    assert high - low == pytest.approx(width, rel=0.15)
    narrow = clips.confidence_intervals(resamples=400, seed=1, level=0.5)["accuracy"]
    assert low < narrow[0] <= narrow[1] < high


def test_confidence_intervals_of_what_is_perfect():
    intervals = ScoredClips(np.eye(4), np.arange(4)).confidence_intervals(50)
    assert intervals["accuracy"] == (1, 1)
    assert intervals["d_prime"] == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.zeros((0, 3)), [], r"scores must be \(clips, labels\), got \(0, 3\)"),
        (np.zeros(3), [0, 1, 2], r"scores must be \(clips, labels\), got \(3,\)"),
        (np.zeros((2, 3)), [0], r"class indices \(2,\) or zeros and ones \(2, 3\) .* got \(1,\)"),
        (np.zeros((2, 3)), np.zeros((2, 2)), r"got \(2, 2\)"),
        (np.zeros((2, 3)), [0, 3], "targets must be from 0 to 2, got 3"),
        (np.zeros((2, 3)), [0, -100], "targets must be from 0 to 2, got -100"),
        (np.zeros((2, 3)), np.full((2, 3), 0.5), "targets must be from 0 to 1, got 0.5"),
        (np.array([[0.5, math.nan], [0.1, 0.2]]), [0, 1], "1 clips have NaN scores"),
        (np.array([[-3.0, 5.0]]), [1], "must be probabilities, 0 to 1, got -3 to 5.*softmax"),
    ],
)
def test_mistakes(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(scores, targets)


def test_accuracy_is_of_one_label_per_clip():
    with pytest.raises(ValueError, match="Accuracy needs one label per clip"):
        ScoredClips(np.zeros((2, 3)), np.zeros((2, 3))).accuracy()
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        ScoredClips(np.zeros((2, 3)), [0, 1]).confidence_intervals(0)
