"""Logits to scores, windows to the whole sound, scores to labels: one function each.

logits  (..., labels)
scores  (..., labels)       softmax: sum to 1; sigmoid: each label by itself; or the logits
        (windows, labels)   of a sound in windows -> (labels,) of the whole sound
labels  [LabelScore(score, label), ...], best first

Needs no torch: logits and scores are tensors, or arrays where a function says so.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .pooling_ast import pool_scores

if TYPE_CHECKING:
    from torch import Tensor

_FUNCTIONS = {
    None: "softmax",  # as in `transformers`
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


class LabelScore(NamedTuple):
    """A label and its score."""

    score: float
    label: str


def activation(problem_type: str | None) -> str:
    """The function from logits to scores: "softmax", "sigmoid" or "none".

    Raises:
        ValueError: for an unknown problem type.
    """
    if problem_type not in _FUNCTIONS:
        raise ValueError(
            f"Unknown problem_type {problem_type!r}; expected one of "
            f"{', '.join(name for name in _FUNCTIONS if name)}."
        )
    return _FUNCTIONS[problem_type]


def scores_from_logits(
    logits: "Tensor", problem_type: str | None, function_to_apply: str | None = None
) -> "Tensor":
    """A score for each label.

    Args:
        logits: (..., labels).
        problem_type: the config's; None, as in published AudioSet checkpoints, means softmax.
        function_to_apply: "softmax", "sigmoid" or "none", overriding the problem type's.

    Raises:
        ValueError: for an unknown problem type or function.
    """
    if function_to_apply is None:
        function_to_apply = activation(problem_type)
    if function_to_apply == "softmax":
        return logits.softmax(dim=-1)
    if function_to_apply == "sigmoid":
        return logits.sigmoid()
    if function_to_apply == "none":
        return logits
    raise ValueError(
        f"function_to_apply must be softmax, sigmoid or none, got {function_to_apply!r}."
    )


def pool_windows(scores: Any, lengths: Any, pooling: str | None = None) -> Any:
    """A sound's scores from its windows'.

    Args:
        scores: (windows, labels), tensor or array.
        lengths: (windows,), of the same kind: how much sound is in each, in any unit.
        pooling: one of `WINDOW_POOLINGS`; None: the mean weighted by the lengths.

    Returns:
        (labels,).
    """
    return pool_scores(scores, pooling or "mean", lengths)


def top_labels(
    scores: np.ndarray,
    label_names: Sequence[str],
    top_k: int | None = None,
    thresholds: np.ndarray | None = None,
) -> list[LabelScore]:
    """The highest-scoring labels, best first.

    Args:
        scores: (labels,).
        label_names: in the order of the scores.
        top_k: at most this many; None: all.
        thresholds: (labels,) or one number; labels that score less are dropped.
    """
    if thresholds is not None:
        scores = np.where(scores < thresholds, -math.inf, scores)
    best = np.argsort(-scores, kind="stable")[:top_k]
    return [
        LabelScore(score, label_names[index])
        for score, index in zip(scores[best].tolist(), best.tolist(), strict=True)
        if score > -math.inf
    ]
