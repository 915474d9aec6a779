"""Turns scores into probabilities, and finds thresholds that keep a promise.

logits  (windows, labels)   of windows that the head was not fitted on
scores  (windows, labels)   probabilities, once the logits are calibrated

A calibration is `scale * logits + shift` per label. Both fold into the classifier's dense layer, so
every runtime of the checkpoint has them. Labels that exclude each other share one temperature
(arXiv 1706.04599), which does not change the ranking; independent ones get a scale and a shift each
(Platt 1999).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .heads import log_loss

# A label gets its own scale and shift from this many recordings with it, and without it.
ENOUGH_RECORDINGS = 10
CONFIDENCE = 0.9  # of the intervals: 5 % lie below, 5 % above
_RESAMPLES = 500


@dataclass(frozen=True)
class Calibration:
    """(labels,) each, and which labels had too few recordings for their own."""

    scale: np.ndarray
    shift: np.ndarray
    shared: np.ndarray  # bool

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        return logits * self.scale + self.shift


def calibrate(
    logits: np.ndarray, targets: np.ndarray, recordings: np.ndarray, exclusive: bool
) -> Calibration:
    """The calibration that makes the right answers most likely.

    Args:
        logits: (windows, labels); NaN where there are none.
        targets: (windows, labels); NaN where unknown.
        recordings: (windows,).
        exclusive: softmax over the labels, or a sigmoid each.
    """
    from scipy.optimize import minimize, minimize_scalar

    labels = targets.shape[1]
    one, zero = np.ones(labels), np.zeros(labels)
    known = ~np.isnan(logits) & ~np.isnan(targets)
    if not known.any():
        return Calibration(one, zero, np.ones(labels, bool))

    def shared_loss(log_scale: float) -> float:
        return log_loss(np.exp(log_scale) * logits, targets, exclusive)

    # A few perfectly separated marks would lead to an infinite scale.
    found = minimize_scalar(shared_loss, bounds=(-4, 2), method="bounded")
    scale, shift = one * np.exp(found.x), zero.copy()
    shared = np.ones(labels, bool)
    if exclusive:
        return Calibration(scale, shift, shared)
    for label in range(labels):
        rows = known[:, label]
        there = targets[rows, label] > 0
        counts = [len(np.unique(recordings[rows][mask])) for mask in (there, ~there)]
        if min(counts) < ENOUGH_RECORDINGS:
            continue
        shared[label] = False
        of_label = logits[rows, label]
        # Platt's targets keep the fit finite if the labels are perfectly separated.
        positives, negatives = there.sum(), (~there).sum()
        wanted = np.where(there, (positives + 1) / (positives + 2), 1 / (negatives + 2))

        def loss(
            x: np.ndarray, of_label: np.ndarray = of_label, wanted: np.ndarray = wanted
        ) -> float:
            answer = np.exp(x[0]) * of_label + x[1]
            return float((np.logaddexp(0, answer) - wanted * answer).mean())

        best = minimize(loss, [found.x, 0.0], method="BFGS")
        scale[label], shift[label] = np.exp(best.x[0]), best.x[1]
    return Calibration(scale, shift, shared)


@dataclass(frozen=True)
class Wish:
    """The goal of a threshold: the highest F1 (precision None), or at least this precision."""

    precision: float | None = None

    @classmethod
    def read(cls, word: str) -> "Wish":
        """ "f1", or "precision=0.9".

        Raises:
            ValueError: for anything else.
        """
        if word == "f1":
            return cls()
        name, _, value = word.partition("=")
        try:
            precision = float(value)
        except ValueError:
            precision = math.nan
        if name != "precision" or not 0 < precision < 1:
            raise ValueError(f"must be f1, or for example precision=0.9, got {word!r}.")
        return cls(precision)

    def __str__(self) -> str:
        return "highest F1" if self.precision is None else f"precision at least {self.precision:g}"


@dataclass(frozen=True)
class Threshold:
    """A label's threshold, what it reaches on the marks, and whether to rely on that.

    Intervals hold with 90 % confidence; recordings, not windows, count as independent.
    """

    label: str
    value: float
    precision: float
    precision_interval: tuple[float, float]
    recall: float
    f1: float
    f1_interval: tuple[float, float]
    recordings: int  # with the label
    kept: bool
    message: str  # if not: why, and what would help

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def interval(successes: float, trials: float) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a proportion; trials can be fractional."""
    from scipy.stats import beta

    tail = (1 - CONFIDENCE) / 2
    low = beta.ppf(tail, successes, trials - successes + 1) if successes > 0 else 0.0
    high = beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


def recordings_needed(precision: float) -> int:
    """How many recordings must be detected without a mistake to promise a precision."""
    return math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log(precision))


def choose_thresholds(
    scores: np.ndarray,
    targets: np.ndarray,
    recordings: np.ndarray,
    labels: Sequence[str],
    wish: Wish,
) -> list[Threshold]:
    """A threshold per label.

    For a precision: the lowest threshold at which the whole confidence interval is above it.
    Windows of one recording are alike, so the interval counts recordings: if two thirds of a
    recording's detections are right, it counts as two thirds of a success.

    Args:
        scores: (windows, labels) of windows that the head was not fitted on; NaN where none.
        targets: (windows, labels); NaN where unknown.
        recordings: (windows,).
        labels: names.
        wish: the goal.
    """
    return [
        _choose(scores[:, i], targets[:, i], recordings, label, wish)
        for i, label in enumerate(labels)
    ]


def _choose(
    scores: np.ndarray, targets: np.ndarray, recordings: np.ndarray, label: str, wish: Wish
) -> Threshold:
    known = ~np.isnan(scores) & ~np.isnan(targets)
    order = np.argsort(-scores[known], kind="stable")
    scores, there = scores[known][order], targets[known][order] > 0
    recordings = np.unique(recordings[known][order], return_inverse=True)[1]
    with_label = len(np.unique(recordings[there]))
    if not there.any() or there.all():
        what = "without" if there.any() else "with"
        return Threshold(
            label, 0.5, math.nan, (0.0, 1.0), math.nan, math.nan, (0.0, 1.0), with_label, False,
            f"no marked recording {what} it: 0.5 is a guess",
        )  # fmt: skip
    hits = np.cumsum(there)
    found = np.arange(1, len(there) + 1)
    precision, recall = hits / found, hits / there.sum()
    f1 = 2 * precision * recall / (precision + recall + 1e-12)
    # Thresholds lie between two different scores.
    last = np.flatnonzero(np.r_[scores[1:] < scores[:-1], True])
    right, independent = _per_recording(there, recordings)
    kept, message = True, ""
    if wish.precision is None:
        best = last[np.argmax(f1[last])]
        if with_label < ENOUGH_RECORDINGS:
            kept, message = False, _few(with_label)
    else:
        lows = np.array([interval(right[i], independent[i])[0] for i in last])
        enough = np.flatnonzero(lows >= wish.precision)
        if len(enough):
            best = last[enough[-1]]
        else:
            best, kept = last[np.argmax(lows)], False
            message = (
                f"these marks cannot guarantee {wish}, but {lows.max():.2f} at best; it takes "
                f"{recordings_needed(wish.precision)} recordings detected without a mistake"
            )
    below = scores[best + 1] if best + 1 < len(scores) else 0.0
    return Threshold(
        label=label,
        value=float((scores[best] + below) / 2),
        precision=float(precision[best]),
        precision_interval=interval(right[best], independent[best]),
        recall=float(recall[best]),
        f1=float(f1[best]),
        f1_interval=_f1_interval(found <= best + 1, there, recordings),
        recordings=with_label,
        kept=kept,
        message=message,
    )


def _per_recording(there: np.ndarray, recordings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """After each window: the sum of recordings' shares of right ones, and the recordings so far."""
    found = np.zeros(recordings.max() + 1)
    hits = np.zeros_like(found)
    right, count = np.empty(len(there)), np.empty(len(there))
    total = 0.0
    for window, (is_hit, recording) in enumerate(zip(there, recordings, strict=True)):
        if found[recording]:
            total -= hits[recording] / found[recording]
        found[recording] += 1
        hits[recording] += is_hit
        total += hits[recording] / found[recording]
        right[window] = total
        count[window] = count[window - 1] + (found[recording] == 1) if window else 1
    return np.minimum(right, count), count


def _few(recordings: int) -> str:
    return (
        f"only {recordings} marked recordings with it: a threshold needs at least "
        f"{ENOUGH_RECORDINGS} to hold elsewhere"
    )


def _f1_interval(
    above: np.ndarray, there: np.ndarray, recordings: np.ndarray
) -> tuple[float, float]:
    """Bootstrap over recordings."""
    count = recordings.max() + 1
    per_recording = np.stack(
        [
            np.bincount(recordings, weights=mask, minlength=count)
            for mask in (above & there, above & ~there, ~above & there)
        ]
    )  # (3, recordings): hits, false alarms, misses
    random = np.random.default_rng(0)
    weights = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    hits, alarms, misses = per_recording @ weights.T
    f1 = 2 * hits / np.maximum(2 * hits + alarms + misses, 1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(f1, [tail, 1 - tail])
    return float(low), float(high)
