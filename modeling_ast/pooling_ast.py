"""Pools scores over time: from a clip's windows or frames to the whole clip.

scores  (..., parts, labels)    of windows or frames, 0..1 where the pooling weighs by them
pooled  (..., labels)

`pool_logits` does the same from logits to logits, for a loss.

What a clip-level label says about the parts depends on the sound. Rain fills a recording: every
part should agree (mean). A bark is in one part of a hundred: one suffices (max). Linear softmax
weights each part by its own score, so it is close to the mean if all are alike and to the maximum
if a few stand out; unlike the maximum, it has a gradient in every part. Wang, Li and Metze
(arXiv 1810.09050) compare these and attention.

Needs no torch: what is said of tensors also holds for numpy's arrays.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 1e-6  # a pooled score is clamped to this before its logarithm is taken


def _mean(scores: Any, weights: Any) -> Any:
    return (scores * weights).sum(-2) / weights.sum(-2)


def _max(scores: Any, weights: Any) -> Any:
    of_some = scores - (weights == 0) * 1e30
    return of_some.amax(-2) if hasattr(of_some, "amax") else of_some.max(-2)


def _linear_softmax(scores: Any, weights: Any) -> Any:
    weighed = scores * weights
    return (scores * weighed).sum(-2) / weighed.sum(-2).clip(min=1e-6)


WINDOW_POOLINGS: dict[str, Callable[[Any, Any], Any]] = {
    "mean": _mean,
    "max": _max,
    "linear_softmax": _linear_softmax,
}


def check_pooling(pooling: str) -> None:
    """Raise ValueError for an unknown pooling."""
    if pooling not in WINDOW_POOLINGS:
        raise ValueError(
            f"window_pooling must be one of {', '.join(WINDOW_POOLINGS)}, got {pooling[:60]!r}."
        )


def pool_scores(scores: Any, pooling: str, weights: Any = None) -> Any:
    """A clip's scores from its parts' scores.

    Args:
        scores: (..., parts, labels).
        pooling: one of `WINDOW_POOLINGS`. "linear_softmax" is for scores in 0..1.
        weights: (..., parts), 0 or more: how much sound is in each part; 0 excludes it. "max" only
            checks for 0. None: equal weights.

    Returns:
        (..., labels).

    Raises:
        ValueError: for an unknown pooling.
    """
    check_pooling(pooling)
    if weights is None:
        weights = scores[..., 0] * 0 + 1
    weights = weights.to(scores) if hasattr(weights, "to") else weights.astype(scores.dtype)
    return WINDOW_POOLINGS[pooling](scores, weights[..., None])


def pool_logits(
    logits: "Tensor", problem_type: str | None, pooling: str, weights: "Tensor | None" = None
) -> "Tensor":
    """A clip's logits from its parts' logits, such that their scores are the parts' pooled scores.

    If labels exclude each other, pooled scores need not add up to 1; the softmax of these logits
    does.

    Args:
        logits: (..., parts, labels).
        problem_type: from a config: "multi_label_classification" makes scores by sigmoid,
            "regression" uses the logits, anything else softmax.
        pooling, weights: see `pool_scores`.

    Returns:
        (..., labels), float32.
    """
    logits = logits.float()
    if problem_type == "regression":
        return pool_scores(logits, pooling, weights)
    if problem_type == "multi_label_classification":
        scores = pool_scores(logits.sigmoid(), pooling, weights).clamp(_SMALLEST, 1 - _SMALLEST)
        return scores.logit()
    return pool_scores(logits.softmax(dim=-1), pooling, weights).clamp(min=_SMALLEST).log()
