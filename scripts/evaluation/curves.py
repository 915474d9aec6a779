"""Curves that show whether scores can be trusted: reliability, and precision over recall."""

from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import write_whole
from ..common.shown import readable
from .metrics import CALIBRATION_BINS, ScoredClips

_CURVES = 12  # classes, each with its own colour


def reliability(measured: ScoredClips) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted probability and actual frequency, in bins of probability.

    With one label per clip, over each clip's best label; with several, over all labels of all
    clips.

    Returns:
        mean probability, share that was right (NaN in empty bins), answers; (15,) each.
    """
    if measured.is_multi_label:
        confidence, right = measured.scores.ravel(), measured.relevant.ravel()
    else:
        confidence = measured.scores.max(axis=1)
        right = (measured.decided & measured.relevant).any(axis=1)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    bins = np.searchsorted(edges, confidence)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        promised = np.bincount(bins, confidence, CALIBRATION_BINS) / count
        true = np.bincount(bins, right, CALIBRATION_BINS) / count
    return promised, true, count


def precision_recall(scores: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at every distinct threshold, highest first.

    Args:
        scores: (N,).
        there: (N,) bool, at least one.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(there[order])
    last = np.r_[scores[order][1:] < scores[order][:-1], True]
    return (hits / hits[-1])[last], (hits / np.arange(1, len(hits) + 1))[last]


def draw_reliability(measured: ScoredClips, path: Path) -> None:
    """Actual frequency over predicted probability, with the number of answers per bin."""
    from matplotlib.figure import Figure

    promised, true, count = reliability(measured)
    figure = Figure(figsize=(4.8, 5.4), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.plot(promised, true, "o-", color="#2b6ca3")
    error = measured.expected_calibration_error()
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that was right")
    axes.set_title(f"calibration error {error:.3f}, {len(measured.scores)} clips")
    places = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
    below.bar(places, count, width=0.9 / CALIBRATION_BINS, color="#6a9fcf")
    below.set(
        xlabel="probability", ylabel="answers", yscale="log" if count.max() > 1000 else "linear"
    )
    _save(figure, path)


def draw_precision_recall(measured: ScoredClips, labels: list[str], path: Path) -> None:
    """A curve per class with clips; if there are many, the lowest average precisions in colour."""
    from matplotlib.figure import Figure
    from sklearn.metrics import average_precision_score

    relevant = measured.relevant
    classes = np.flatnonzero(relevant.any(axis=0) & ~relevant.all(axis=0))
    values = {
        index: average_precision_score(relevant[:, index], measured.scores[:, index])
        for index in classes.tolist()
    }
    ranked = sorted(values, key=lambda index: values[index])
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for rank, index in reversed(list(enumerate(ranked))):
        recall, precision = precision_recall(measured.scores[:, index], relevant[:, index])
        style: dict[str, Any] = {"color": "lightgrey", "linewidth": 0.8}
        if rank < _CURVES:
            name = readable(labels[index])
            name = name if len(name) <= 24 else name[:23] + "…"
            style = {"color": f"C{rank % 10}", "label": f"{values[index]:.2f} {name}"}
        axes.step(np.r_[0, recall], np.r_[precision[:1], precision], where="pre", **style)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    if ranked:
        title = "average precision" if len(ranked) <= _CURVES else "the lowest average precisions"
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        for text in axes.legend(title=title, frameon=False, **place).get_texts():
            text.set_parse_math(False)  # a class name can contain $
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))
