"""Reliability diagrams and precision-recall curves: their numbers and their drawing."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from scripts.evaluation.curves import (
    draw_precision_recall,
    draw_reliability,
    precision_recall,
    reliability,
)
from scripts.evaluation.metrics import ScoredClips


@pytest.fixture(params=["one label", "several"])
def measured(request) -> ScoredClips:
    random = np.random.default_rng(0)
    scores = random.dirichlet(np.ones(4), size=300)
    if request.param == "several":
        return ScoredClips(scores, (random.random((300, 4)) < scores).astype(int))
    return ScoredClips(scores, np.array([random.choice(4, p=row) for row in scores]))


def test_reliability_holds_the_calibration_error(measured):
    """The gaps between prediction and truth, weighted by answers, are the expected error."""
    promised, true, count = reliability(measured)
    assert count.sum() == (300 * 4 if measured.is_multi_label else 300)
    gaps = np.nansum(np.abs(promised - true) * count) / count.sum()
    assert gaps == pytest.approx(measured.expected_calibration_error(), abs=1e-9)


def test_precision_and_recall_are_scikit_learn_s():
    random = np.random.default_rng(1)
    scores, there = random.integers(0, 9, 80) / 9, random.random(80) < 0.3
    recall, precision = precision_recall(scores, there)
    expected_precision, expected_recall, _ = precision_recall_curve(there, scores)
    points = dict(zip(expected_recall.round(9), expected_precision.round(9), strict=True))
    assert (np.diff(recall) >= 0).all()
    steps = np.diff(np.r_[0, recall])
    assert (steps * precision).sum() == pytest.approx(average_precision_score(there, scores))
    assert set(recall.round(9)) <= set(points)


def test_they_are_drawn(measured, tmp_path):
    draw_reliability(measured, tmp_path / "reliability.png")
    draw_precision_recall(
        measured, ["$x_1^", "b" * 40, "c_$", "d"], tmp_path / "precision_recall.png"
    )
    for name in ("reliability", "precision_recall"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
