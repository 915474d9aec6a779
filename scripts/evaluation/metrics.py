"""Metrics of audio classification, equal to scikit-learn's, with bootstrap confidence intervals.

scores    (N, labels)   probabilities; rankings (average precision, ROC-AUC) take any scores
targets   (N,)          class indices: one label per clip
          (N, labels)   0 or 1: any number of labels per clip

`METRICS` is the table of metrics: to add one, add an entry; training, reports, cards and `evaluate`
read it. `compute_metrics` returns all that apply as numbers, `ScoredClips` also per class and with
confidence intervals. Means over classes exclude classes without positives.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tqdm.auto import tqdm

CALIBRATION_BINS = 15  # Guo et al., arXiv 1706.04599
_DECISION = 0.5  # a multi-label model predicts a label from this probability up
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"


@dataclass(frozen=True)
class Metric:
    """A figure over clips.

    Args:
        title: its name for people.
        function: computes it; None for the loss, which comes from the model, not from scores.
        higher_is_better: whether more is better.
        kinds: the problem types it applies to.
        over_classes: whether it is a mean over the classes that have positives.
        is_headline: whether it is the one to quote first.
    """

    title: str
    function: "Callable[[Measurement], float] | None"
    higher_is_better: bool = True
    kinds: tuple[str, ...] = (SINGLE_LABEL, MULTI_LABEL)
    over_classes: bool = False
    is_headline: bool = False

    def is_better(self, new: float | None, old: float | None) -> bool:
        """Whether a value is better than the best so far; None means undefined."""
        if new is None or old is None:
            return old is None and new is not None
        return new > old if self.higher_is_better else new < old


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "accuracy", lambda m: m.clips.accuracy(m.weights), kinds=(SINGLE_LABEL,), is_headline=True
    ),
    "macro_f1": Metric("macro F1", lambda m: _mean(m.decisions[2]), over_classes=True),
    "mean_average_precision": Metric(
        "mAP", lambda m: _mean(m.rankings[0]), over_classes=True, is_headline=True
    ),
    "roc_auc": Metric("ROC-AUC", lambda m: _mean(m.rankings[1]), over_classes=True),
    "d_prime": Metric("d′", lambda m: d_prime(_mean(m.rankings[1])), over_classes=True),
    "expected_calibration_error": Metric(
        "ECE", lambda m: m.clips.expected_calibration_error(m.weights), higher_is_better=False
    ),
    "loss": Metric("loss", None, higher_is_better=False),
}


def headline(names: Iterable[str]) -> str:
    """The measured metric to quote: accuracy, or mAP for several labels."""
    measured = set(names)
    return next(name for name, metric in METRICS.items() if metric.is_headline and name in measured)


def compute_metrics(scores: Any, targets: Any) -> dict[str, float]:
    """All metrics of a problem type, which the shape of the targets determines.

    Args:
        scores: (N, labels) probabilities: softmax or sigmoid of the logits.
        targets: (N,) class indices, or (N, labels) of 0 and 1.

    Returns:
        Those of `METRICS` that apply, and "classes_without_positives": how many classes the means
        over classes exclude. NaN if no class is left; d′ of a perfect ROC-AUC is infinite.

    Raises:
        ValueError: if shapes do not fit, or scores are NaN or not probabilities.
    """
    clips = ScoredClips(scores, targets)
    return {**clips.metrics(), "classes_without_positives": len(clips.classes_without_positives)}


class ScoredClips:
    """Scores and targets of clips, to be measured with or without weights.

    A weight (N,) says how often a clip counts. Each class is sorted only once, which makes a
    thousand bootstrap resamples affordable.

    Args:
        scores: (N, labels), as for `compute_metrics`.
        targets: (N,) or (N, labels), as for `compute_metrics`.

    Raises:
        ValueError: if shapes do not fit, a target is not a class, or a score is NaN.
    """

    def __init__(self, scores: Any, targets: Any):
        self.scores = np.asarray(scores)
        targets = np.asarray(targets)
        if self.scores.ndim != 2 or not self.scores.size:
            raise ValueError(f"scores must be (clips, labels), got {self.scores.shape}.")
        num_clips, num_labels = self.scores.shape
        if targets.shape not in ((num_clips,), (num_clips, num_labels)):
            raise ValueError(
                f"targets must be class indices {(num_clips,)} or zeros and ones "
                f"{self.scores.shape} for scores of {self.scores.shape}, got {targets.shape}."
            )
        if np.isnan(self.scores).any():
            raise ValueError(f"{np.isnan(self.scores).any(axis=1).sum()} clips have NaN scores.")
        self.is_multi_label = targets.ndim == 2
        classes = (0, 1) if self.is_multi_label else range(num_labels)
        if not np.isin(targets, list(classes)).all():
            wrong = targets[~np.isin(targets, list(classes))][0]
            raise ValueError(f"targets must be from {classes[0]} to {classes[-1]}, got {wrong}.")
        if self.is_multi_label:
            self.relevant = targets.astype(bool)  # (N, labels)
            self.decided = self.scores >= _DECISION  # (N, labels)
        else:
            self.relevant = np.arange(num_labels) == targets[:, None]
            self.decided = np.arange(num_labels) == self.scores.argmax(axis=1)[:, None]

        self._order = np.argsort(-self.scores.T, axis=1, kind="stable")  # (labels, N)
        ranked = np.take_along_axis(self.scores.T, self._order, axis=1)
        # Clips with equal scores share a rank: where each group starts and ends (exclusive).
        ranks = np.arange(num_clips)
        new = np.ones((num_labels, num_clips + 1), bool)
        new[:, 1:-1] = ranked[:, 1:] != ranked[:, :-1]
        first = np.maximum.accumulate(np.where(new[:, :-1], ranks, 0), axis=1)
        end = np.where(new[:, 1:], ranks + 1, num_clips)
        end = np.minimum.accumulate(end[:, ::-1], axis=1)[:, ::-1]
        # The positives (P,) of all labels, by label and rank; other clips are only counted.
        self._label, rank = np.nonzero(np.take_along_axis(self.relevant.T, self._order, axis=1))
        self._clip = self._order[self._label, rank]
        self._first, self._end = first[self._label, rank], end[self._label, rank]
        place, start = self._label * num_clips + rank, self._label * num_clips
        # How many positives of all labels come before the label's first, the group, and its end.
        self._positives_before = [
            np.searchsorted(place, start + offset) for offset in (0, self._first, self._end)
        ]

    @property
    def classes_without_positives(self) -> list[int]:
        return np.flatnonzero(~self.relevant.any(axis=0)).tolist()

    def accuracy(self, weights: np.ndarray | None = None) -> float:
        """Share of clips whose highest score is on their label.

        Raises:
            ValueError: with several labels per clip.
        """
        if self.is_multi_label:
            raise ValueError("Accuracy needs one label per clip: targets (N,), not (N, labels).")
        return float(np.average((self.decided & self.relevant).any(axis=1), weights=weights))

    def decisions(
        self, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 per class, (labels,), of the best label or those from 0.5 up.

        NaN where undefined: recall and F1 without positives, precision of labels never predicted.
        """
        if self.is_multi_label:
            self._check_probabilities()
        weights = self._weights(weights)
        decided_clip, decided_label = self._decided_pairs
        given = self._per_label(decided_label, weights[decided_clip])
        own = weights[self._clip]
        positives = self._per_label(self._label, own)
        hits = self._per_label(self._label, own * self.decided[self._clip, self._label])
        f1 = np.where(positives > 0, _ratio(2 * hits, given + positives), np.nan)
        return _ratio(hits, given), _ratio(hits, positives), f1

    def rankings(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Average precision and ROC-AUC of each class, (labels,).

        NaN where undefined: without positives, and ROC-AUC also without negatives.
        """
        weights = self._weights(weights)
        above = np.zeros((len(self._order), len(weights) + 1))  # weight of a label's first ranks
        np.cumsum(weights[self._order], axis=1, out=above[:, 1:])
        own = weights[self._clip]  # (P,), as all below
        before = np.concatenate([[0], np.cumsum(own)])
        base, first, end = (before[count] for count in self._positives_before)
        hits_first, hits_end = first - base, end - base
        above_first, above_end = above[self._label, self._first], above[self._label, self._end]

        total = self._per_label(self._label, own)
        precision = np.nan_to_num(_ratio(hits_end, above_end))  # of weight 0: own is 0
        average_precision = _ratio(self._per_label(self._label, own * precision), total)
        # A negative above a positive is one wrong pair, one of the same score half a pair.
        wrong = (above_first - hits_first + above_end - hits_end) / 2
        wrong_pairs = self._per_label(self._label, own * wrong)
        return average_precision, 1 - _ratio(wrong_pairs, total * (weights.sum() - total))

    def expected_calibration_error(self, weights: np.ndarray | None = None) -> float:
        """Mean distance between the probability of an answer and how often it is right.

        Over 15 bins of equal width, weighted by their counts (Guo et al., arXiv 1706.04599). An
        answer is a clip's best label or, with several labels per clip, any (clip, label) pair.
        """
        weights = self._weights(weights)
        gaps, answers_per_clip = self._calibration_gaps
        return float(np.abs(weights @ gaps).sum() / (weights.sum() * answers_per_clip))

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """The metrics of `compute_metrics`, without the count."""
        kind = MULTI_LABEL if self.is_multi_label else SINGLE_LABEL
        measurement = Measurement(self, weights)
        return {
            name: metric.function(measurement)
            for name, metric in METRICS.items()
            if metric.function is not None and kind in metric.kinds
        }

    def confidence_intervals(
        self, resamples: int = 1000, seed: int = 0, level: float = 0.95
    ) -> dict[str, tuple[float, float]]:
        """Low and high end of each metric, by the percentile bootstrap over clips (Efron, 1979).

        It shows how much the metrics depend on which clips are in the set, not on the seed of the
        training. A class without positives in a resample is excluded from it.

        Raises:
            ValueError: for fewer than one resample.
        """
        if resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {resamples}.")
        random = np.random.default_rng(seed)
        num_clips = len(self.scores)
        drawn = []
        for _ in tqdm(range(resamples), desc="bootstrap", delay=2, leave=False):
            picks = random.integers(num_clips, size=num_clips)
            drawn.append(self.metrics(np.bincount(picks, minlength=num_clips)))
        intervals = {}
        for name in drawn[0]:
            values = np.array([metrics[name] for metrics in drawn])
            values = values[~np.isnan(values)]
            ends = [(1 - level) / 2, (1 + level) / 2]
            # Values that were drawn, not interpolated ones: d′ can be infinite.
            low, high = (
                np.quantile(values, ends, method="inverted_cdf") if len(values) else [math.nan] * 2
            )
            intervals[name] = (float(low), float(high))
        return intervals

    @cached_property
    def _decided_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        clip, label = np.nonzero(self.decided)
        return clip, label

    @cached_property
    def _calibration_gaps(self) -> tuple[np.ndarray, int]:
        """Each clip's probability minus truth, summed per bin (N, bins); answers per clip."""
        self._check_probabilities()
        if self.is_multi_label:
            confidence, right = self.scores, self.relevant
        else:
            confidence = self.scores.max(axis=1, keepdims=True)
            right = (self.decided & self.relevant).any(axis=1, keepdims=True)
        num_clips, answers = right.shape
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
        bins = np.searchsorted(edges, confidence) + CALIBRATION_BINS * np.arange(num_clips)[:, None]
        gaps = np.bincount(
            bins.ravel(),
            weights=(confidence.astype(np.float64) - right).ravel(),
            minlength=CALIBRATION_BINS * num_clips,
        )
        return gaps.reshape(num_clips, CALIBRATION_BINS), answers

    def _per_label(self, labels: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(labels, weights=values, minlength=self.scores.shape[1])

    def _weights(self, weights: np.ndarray | None) -> np.ndarray:
        if weights is None:
            return np.ones(len(self.scores))
        return np.asarray(weights, np.float64)

    def _check_probabilities(self) -> None:
        low, high = self.scores.min(), self.scores.max()
        if low < 0 or high > 1 + 1e-6:
            raise ValueError(
                f"scores must be probabilities, 0 to 1, got {low:g} to {high:g}. Take the softmax "
                "of the logits, or their sigmoid for several labels per clip."
            )


class Measurement:
    """Scored clips with weights; values shared by several metrics are computed once."""

    def __init__(self, clips: ScoredClips, weights: np.ndarray | None = None):
        self.clips: ScoredClips = clips
        self.weights: np.ndarray | None = weights

    @cached_property
    def decisions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.clips.decisions(self.weights)

    @cached_property
    def rankings(self) -> tuple[np.ndarray, np.ndarray]:
        return self.clips.rankings(self.weights)


def d_prime(roc_auc: float) -> float:
    """Distance of two unit-variance normal distributions with this ROC-AUC: √2 Φ⁻¹(ROC-AUC)."""
    if not 0 < roc_auc < 1:  # also NaN
        return {0.0: -math.inf, 1.0: math.inf}.get(roc_auc, math.nan)
    return math.sqrt(2) * statistics.NormalDist().inv_cdf(roc_auc)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    """Mean over the classes that have a value."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan
