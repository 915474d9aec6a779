"""Linear heads on embeddings, fitted in seconds, that fit exactly into a checkpoint's classifier.

embeddings  (windows, D)        `pooler_output`
normed      (windows, D)        the same after the classifier's LayerNorm, whose weight is 1, bias 0
targets     (windows, labels)   1: present; 0: absent; NaN: unknown
logits      (windows, labels)   normed @ weight.T + bias: the classifier's dense layer

Labels exclude each other (softmax) or are independent (sigmoid, each fitted on the windows where it
is known). Features are standardised for the fit, which folds into the dense layer.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Strengths of the L2 penalty to choose from, in scikit-learn's convention: high is weak.
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
DEFAULT_STRENGTH = 0.1  # if nothing can be held out
_FOLDS = 5
_SMALLEST = 1e-6  # lower limit of probabilities, for their logarithm


def layer_normed(embeddings: np.ndarray, epsilon: float) -> np.ndarray:
    """LayerNorm with weight 1 and bias 0 of (windows, D)."""
    return _centred(embeddings) / layer_deviation(embeddings, epsilon)[:, None]


def layer_deviation(embeddings: np.ndarray, epsilon: float) -> np.ndarray:
    """What LayerNorm divides (windows, D) by, (windows,)."""
    centred = _centred(embeddings)
    squares = np.einsum("ij,ij->i", centred, centred)
    deviation: np.ndarray = np.sqrt(squares / np.float32(centred.shape[1]) + np.float32(epsilon))
    return deviation


def _centred(embeddings: np.ndarray) -> np.ndarray:
    centred: np.ndarray = embeddings - embeddings.mean(axis=1, keepdims=True, dtype=np.float32)
    return centred


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of every feature, (D,) each; they need no labels."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, normed: np.ndarray) -> "Standard":
        deviation = normed.std(axis=0, dtype=np.float64)
        # A constant feature carries no information, whatever it is divided by.
        return cls(normed.mean(axis=0, dtype=np.float64), np.where(deviation > 0, deviation, 1.0))

    def __call__(self, normed: np.ndarray) -> np.ndarray:
        return ((normed - self.mean) / self.deviation).astype(np.float64)


@dataclass(frozen=True)
class Head:
    """A classifier's dense layer: weight (labels, D), bias (labels,)."""

    weight: np.ndarray
    bias: np.ndarray
    exclusive: bool

    def logits(self, normed: np.ndarray) -> np.ndarray:
        return normed @ self.weight.T.astype(np.float32) + self.bias.astype(np.float32)

    def scores(self, normed: np.ndarray) -> np.ndarray:
        return scores_of(self.logits(normed), self.exclusive)

    def calibrated(self, scale: np.ndarray, shift: np.ndarray) -> "Head":
        """The head whose logits are `scale * logits + shift`, (labels,) each."""
        return Head(self.weight * scale[:, None], self.bias * scale + shift, self.exclusive)


def scores_of(logits: np.ndarray, exclusive: bool) -> np.ndarray:
    """Softmax over the labels, or each one's sigmoid."""
    from scipy.special import expit, softmax

    return softmax(logits, axis=-1) if exclusive else expit(logits)


def are_exclusive(targets: np.ndarray) -> bool:
    """Whether every labelled window has exactly one of the labels, and nothing is unknown."""
    marked = targets[~np.isnan(targets).all(axis=1)]
    return not np.isnan(marked).any() and bool((marked.sum(axis=1) == 1).all())


def fit_heads(
    normed: np.ndarray,
    targets: np.ndarray,
    exclusive: bool,
    standard: Standard,
    strengths: Sequence[float],
    weights: np.ndarray | None = None,
) -> Iterator[Head]:
    """Logistic regressions with an L2 penalty, one per strength.

    Args:
        normed: (windows, D); only labelled windows count.
        targets: (windows, labels).
        exclusive: softmax over the labels; else each by itself.
        standard: of the features.
        strengths: inverse of the penalty, rising: each fit starts from the previous one.
        weights: (windows,), how much each window counts; None: equally.

    Yields:
        heads; a label without an example, or without a counterexample, gets a constant.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def regression() -> LogisticRegression:
        return LogisticRegression(max_iter=200, tol=1e-3, warm_start=True)

    labels, width = targets.shape[1], normed.shape[1]
    known = ~np.isnan(targets)
    used = known.any(axis=1)
    features, targets, known = standard(normed[used]), targets[used], known[used]
    weights = np.ones(len(targets)) if weights is None else weights[used]
    models = [regression() for _ in range(1 if exclusive else labels)]
    for strength in strengths:
        weight, bias = np.zeros((labels, width)), np.zeros(labels)
        with warnings.catch_warnings():
            # 200 steps are ample; with few marks, a class has only one or two examples.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", message="The number of unique classes")
            if exclusive:
                model = models[0].set_params(C=strength)
                _fit_exclusive(model, features, targets, weights, weight, bias)
            else:
                for label in range(labels):
                    rows = known[:, label]
                    model = models[label].set_params(C=strength)
                    _fit_one(
                        model, features[rows], targets[rows, label], weights[rows], label, weight,
                        bias,
                    )  # fmt: skip
        weight = weight / standard.deviation
        yield Head(weight, bias - weight @ standard.mean, exclusive)


def _fit_exclusive(
    model: Any,
    features: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
) -> None:
    classes = targets.argmax(axis=1)
    present = np.unique(classes)
    bias[:] = np.log(_SMALLEST)
    if len(present) == 1:
        bias[present] = 0
        return
    model.fit(features, classes, weights)
    if len(present) == 2:  # scikit-learn keeps the difference of the two
        weight[present[1]], bias[present] = model.coef_[0], [0, model.intercept_[0]]
    else:
        weight[present], bias[present] = model.coef_, model.intercept_


def _fit_one(
    model: Any,
    features: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    label: int,
    weight: np.ndarray,
    bias: np.ndarray,
) -> None:
    positives = targets.sum()
    if 0 < positives < len(targets):
        model.fit(features, targets, weights)
        weight[label], bias[label] = model.coef_[0], model.intercept_[0]
    else:
        # Laplace's rule of succession: never seen is not impossible.
        bias[label] = np.log((positives + 1) / (len(targets) - positives + 1))


def fit_head(
    normed: np.ndarray,
    targets: np.ndarray,
    exclusive: bool,
    standard: Standard,
    strength: float,
    weights: np.ndarray | None = None,
) -> Head:
    """One head, see `fit_heads`."""
    return next(fit_heads(normed, targets, exclusive, standard, [strength], weights))


def recording_folds(targets: np.ndarray, recordings: np.ndarray, seed: int = 0) -> np.ndarray:
    """The fold in which each window is held out; -1: never, because its label has one recording.

    Windows of one recording stay together: neighbours are nearly the same sound, and a fit that has
    seen one knows the other. Each label's recordings are dealt to the folds, rarest label first.

    Args:
        targets: (windows, labels).
        recordings: (windows,) names or numbers.
    """
    random = np.random.default_rng(seed)
    _, recordings = np.unique(recordings, return_inverse=True)
    count = recordings.max(initial=-1) + 1
    has_label = np.zeros((count, targets.shape[1]), bool)
    np.logical_or.at(has_label, recordings, np.nan_to_num(targets) > 0)
    fold = np.full(count, _FOLDS)  # not yet chosen
    per_label = has_label.sum(axis=0)
    for label in np.argsort(per_label, kind="stable"):
        members = random.permutation(np.flatnonzero(has_label[:, label]))
        taken = np.bincount(fold[members], minlength=_FOLDS + 1)[:_FOLDS]
        for recording in members[fold[members] == _FOLDS]:
            choice = int(np.argmin(taken))
            fold[recording] = choice
            taken[choice] += 1
    rest = random.permutation(np.flatnonzero(fold == _FOLDS))
    fold[rest] = np.arange(len(rest)) % _FOLDS
    fold[has_label[:, per_label == 1].any(axis=1)] = -1
    return fold[recordings]


@dataclass(frozen=True)
class Choice:
    """A strength and its performance on recordings that the fit had not seen.

    `logits` (windows, labels) are NaN for windows that were never held out.
    """

    strength: float
    logits: np.ndarray
    losses: dict[float, float]  # by strength: mean -log p of the right answer


def choose_strength(
    normed: np.ndarray,
    targets: np.ndarray,
    recordings: np.ndarray,
    exclusive: bool,
    standard: Standard,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> Choice:
    """Cross-validation over recordings."""
    labelled = ~np.isnan(targets).all(axis=1)
    folds = np.full(len(targets), -1)
    folds[labelled] = recording_folds(targets[labelled], recordings[labelled], seed)
    logits = {strength: np.full(targets.shape, np.nan) for strength in strengths}
    held_out = [fold for fold in range(_FOLDS) if (folds == fold).any()]
    for fold in held_out:
        here = folds == fold
        learnt = labelled & ~here
        if not learnt.any():
            continue
        heads = fit_heads(normed[learnt], targets[learnt], exclusive, standard, strengths)
        for strength, head in zip(strengths, heads, strict=True):
            logits[strength][here] = head.logits(normed[here])
    losses = {s: log_loss(logits[s], targets, exclusive) for s in strengths}
    if any(np.isnan(loss) for loss in losses.values()):
        return Choice(DEFAULT_STRENGTH, logits[strengths[0]], {})
    best = min(strengths, key=lambda strength: losses[strength])
    return Choice(best, logits[best], losses)


def log_loss(logits: np.ndarray, targets: np.ndarray, exclusive: bool) -> float:
    """Mean -log of the right answer's probability; NaN if nothing is known.

    With independent labels: the mean over labels of the mean over their windows.
    """
    known = ~np.isnan(targets) & ~np.isnan(logits)
    if not known.any():
        return float("nan")
    scores = scores_of(np.where(np.isnan(logits), 0, logits), exclusive)
    right = np.where(targets > 0, scores, 1 - scores)
    loss = np.where(known, -np.log(np.maximum(right, _SMALLEST)), 0.0)
    if exclusive:
        return float(loss[known & (targets > 0)].mean())
    has = known.any(axis=0)
    return float((loss.sum(axis=0)[has] / known.sum(axis=0)[has]).mean())
