"""Scores over time to scores of the whole: how the windows or frames of a clip are summed up.

scores  (..., parts, labels)    of windows or frames, 0..1 where the pooling weighs by them
pooled  (..., labels)

`pool_logits` does the same from logits to logits, as a loss wants them.

What a clip-level label says of the parts differs with the sound. Rain fills a recording: every part
must agree (mean). A bark is in one of a hundred parts: one suffices (max). Linear softmax weighs
each part by its own score and so comes near the mean where all are alike and near the maximum where
few stand out, and unlike the maximum it has a gradient in every part (Wang, Li and Metze,
arXiv 1810.09050, who compare these and attention).
"""

from collections.abc import Callable

from torch import Tensor

_SMALLEST = 1e-6  # of a pooled score, where its logarithm is taken


def _mean(scores: Tensor, weights: Tensor) -> Tensor:
    return (scores * weights).sum(dim=-2) / weights.sum(dim=-2)


def _max(scores: Tensor, weights: Tensor) -> Tensor:
    return scores.masked_fill(weights == 0, -1e30).amax(dim=-2)


def _linear_softmax(scores: Tensor, weights: Tensor) -> Tensor:
    weighed = scores * weights
    return (scores * weighed).sum(dim=-2) / weighed.sum(dim=-2).clamp(min=1e-6)


WINDOW_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "max": _max,
    "linear_softmax": _linear_softmax,
}


def check_pooling(pooling: str) -> None:
    """Raise ValueError for a word that is no pooling."""
    if pooling not in WINDOW_POOLINGS:
        raise ValueError(
            f"window_pooling must be one of {', '.join(WINDOW_POOLINGS)}, got {pooling[:60]!r}."
        )


def pool_scores(scores: Tensor, pooling: str, weights: Tensor | None = None) -> Tensor:
    """A clip's scores from those of its parts.

    Args:
        scores: (..., parts, labels).
        pooling: of `WINDOW_POOLINGS`. "linear_softmax" is for scores of 0..1.
        weights: (..., parts), 0 or more: how much sound is in each part; 0 leaves it out. "max"
            asks only whether it is 0. None: all count alike.

    Returns:
        (..., labels).

    Raises:
        ValueError: for another word.
    """
    check_pooling(pooling)
    if weights is None:
        weights = scores.new_ones(scores.shape[:-1])
    return WINDOW_POOLINGS[pooling](scores, weights.to(scores)[..., None])


def pool_logits(
    logits: Tensor, problem_type: str | None, pooling: str, weights: Tensor | None = None
) -> Tensor:
    """A clip's logits from those of its parts: their scores are the pooled scores of the parts.

    Where one label excludes the others, pooled scores need not add up to 1; the softmax of these
    logits does.

    Args:
        logits: (..., parts, labels).
        problem_type: a config's: scores are "multi_label_classification": sigmoid; "regression":
            the logits; others: softmax.
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
