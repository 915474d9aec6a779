"""What to listen to next: windows in the order in which marking them teaches most.

    uncertain   the head cannot decide
    disputed    heads that weight the marked recordings differently disagree
    novel       unlike everything marked, and unlike each other
    likely      a label's highest scores
    random      the baseline for the others

`pick` takes the best of an order, spread over recordings and never the same stretch twice.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from .heads import Head, Standard, fit_head

QUEUES = ("uncertain", "disputed", "novel", "likely", "random")
_MEMBERS = 7  # of the committee
_CANDIDATES = 5  # times as many as are asked for
_SORTED = 1000  # windows, at first
_BLOCK = 65_536  # windows


def uncertainty(scores: np.ndarray, exclusive: bool) -> np.ndarray:
    """1 where the two best labels tie (or one label's score is a half), 0 where all is clear.

    Args:
        scores: (windows, labels).

    Returns:
        (windows,).
    """
    if exclusive and scores.shape[1] > 1:
        best = np.partition(scores, -2, axis=1)
        return 1 - (best[:, -1] - best[:, -2])
    return (1 - np.abs(2 * scores - 1)).max(axis=1)


def committee(
    normed: np.ndarray,
    targets: np.ndarray,
    recordings: np.ndarray,
    exclusive: bool,
    standard: Standard,
    strength: float,
    seed: int = 0,
) -> list[Head]:
    """Heads that weight the marked recordings differently.

    The weights are random (the Bayesian bootstrap, Rubin 1981), so none misses a label.

    Args:
        normed, targets, recordings: of the windows, marked or not.
    """
    random = np.random.default_rng(seed)
    rows = np.flatnonzero(~np.isnan(targets).all(axis=1))
    groups, group_of = np.unique(recordings[rows], return_inverse=True)
    members = []
    for _ in range(_MEMBERS):
        weights = random.exponential(size=len(groups))[group_of]
        members.append(
            fit_head(normed[rows], targets[rows], exclusive, standard, strength, weights)
        )
    return members


def disagreement(members: Sequence[Head], normed: np.ndarray) -> np.ndarray:
    """How much a committee disagrees about some windows.

    The mutual information of answer and head (arXiv 1112.5745), in nats: entropy of the mean answer
    minus the mean of the answers' entropies.

    Args:
        members: from `committee`.
        normed: (windows, D).

    Returns:
        (windows,).
    """
    exclusive = members[0].exclusive
    answers = np.stack([member.scores(normed) for member in members])
    return _entropy(answers.mean(axis=0), exclusive) - _entropy(answers, exclusive).mean(axis=0)


def _entropy(scores: np.ndarray, exclusive: bool) -> np.ndarray:
    def terms(p: np.ndarray) -> np.ndarray:
        return -p * np.log(np.maximum(p, 1e-12))

    entropies = terms(scores) if exclusive else terms(scores) + terms(1 - scores)
    return entropies.sum(axis=-1)


def farthest_first(
    features: np.ndarray, marked: np.ndarray, count: int, allowed: np.ndarray
) -> list[int]:
    """Windows one by one, each the least similar to everything marked or taken before.

    Args:
        features: (windows, D) of length 1.
        marked: positions of the marked ones.
        count: how many.
        allowed: (windows,) bool, which can be taken.
    """
    nearest = np.full(len(features), -1.0, np.float32)  # cosine of the most similar one
    for start in range(0, len(marked), 256):
        some = features[marked[start : start + 256]].T
        for first in range(0, len(features), _BLOCK):
            block = slice(first, first + _BLOCK)
            np.maximum(nearest[block], (features[block] @ some).max(axis=1), out=nearest[block])
    taken: list[int] = []
    left = allowed.copy()
    for _ in range(min(count, int(allowed.sum()))):
        choice = int(np.argmin(np.where(left, nearest, np.inf)))
        taken.append(choice)
        left[choice] = False
        np.maximum(nearest, features @ features[choice], out=nearest)
    return taken


def disputed_apart(
    values: np.ndarray, features: np.ndarray, marked: np.ndarray, count: int, allowed: np.ndarray
) -> list[int]:
    """The least alike of the highest values: heads that dispute a window dispute its likes, too.

    Without this, a round of marks goes to one kind of sound, and costs more than at random.

    Args:
        values: (windows,) from `disagreement`.
        features, marked, count, allowed: as for `farthest_first`.
    """
    candidates = np.flatnonzero(allowed)
    best = np.argsort(-values[candidates], kind="stable")[: _CANDIDATES * count]
    among = np.zeros(len(values), bool)
    among[candidates[best]] = True
    return farthest_first(features, marked, count, among)


def pick(
    values: np.ndarray,
    recordings: np.ndarray,
    spans: np.ndarray,
    count: int,
    allowed: np.ndarray | None = None,
    at_a_time: int | None = None,
) -> list[int]:
    """The windows with the highest values, without those that mostly repeat a better one.

    Args:
        values: (windows,).
        recordings: (windows,) numbers.
        spans: (windows, 2) seconds.
        count: how many.
        allowed: (windows,) bool, which can be taken; None: all.
        at_a_time: after this many from one recording, others come first; None: no limit.

    Returns:
        positions, best first.
    """
    candidates = np.flatnonzero(np.isfinite(values) if allowed is None else allowed)
    taken: dict[int, list[int]] = {}  # recording -> its windows
    turns: list[tuple[int, int]] = []
    first_turn = 0
    for window in _best_first(values, candidates):
        mine = taken.setdefault(int(recordings[window]), [])
        # A recording's windows beyond the count come after all those that are returned.
        if len(mine) == count or any(_repeats(spans[window], spans[other]) for other in mine):
            continue
        turn = 0 if at_a_time is None else len(mine) // at_a_time
        mine.append(window)
        turns.append((turn, window))
        first_turn += turn == 0
        if first_turn == count:
            break
    turns.sort(key=lambda entry: entry[0])  # stable: by value within a turn
    return [window for _, window in turns[:count]]


def _best_first(values: np.ndarray, windows: np.ndarray) -> Iterator[int]:
    """Windows by falling value, ties by position; sorts no more of them than are asked for."""
    number = _SORTED
    while len(windows):
        best = np.ones(len(windows), bool)
        if number < len(windows):
            of_these = values[windows]
            best = of_these >= np.partition(of_these, -number)[-number]
        chosen = windows[best]
        yield from chosen[np.argsort(-values[chosen], kind="stable")].tolist()
        windows = windows[~best]
        number *= 10


def _repeats(one: np.ndarray, other: np.ndarray) -> bool:
    overlap = min(one[1], other[1]) - max(one[0], other[0])
    return overlap > 0.25 * min(one[1] - one[0], other[1] - other[0])
