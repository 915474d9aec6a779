"""Merges the windows of a long recording into events: what was heard, from when to when.

windows   [{"start", "end", "labels": [{"score", "label"}, …]}, …]   the pipeline's, overlapping
scores    (windows, labels)                                          the same, as an array
events    [Event(start, end, label, score), …]                       seconds, in order of time
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .frames_ast import median_filter

_RELEASE = 0.8  # of the threshold


class Event(NamedTuple):
    """A label detected from `start` to `end`, in seconds."""

    start: float
    end: float
    label: str
    score: float  # the highest of its windows


@dataclass(frozen=True)
class EventRules:
    """What counts as an event; see `find_events`.

    Raises:
        ValueError: for a release threshold above the threshold, a negative length, or something
            that is not a number.
    """

    threshold: float | Mapping[str, float] = 0.5
    release_threshold: float | None = None
    minimum_length_s: float = 0.0
    median_filter_s: float = 0.0

    def __post_init__(self) -> None:
        threshold, release = self.threshold, self.release_threshold
        if isinstance(threshold, Mapping):
            for name, value in threshold.items():
                _check_number(value, f"The threshold of {name!r}")
            highest = max(threshold.values(), default=math.inf)
        else:
            _check_number(threshold, "threshold")
            highest = threshold
        if release is not None:
            _check_number(release, "release_threshold")
            if release > highest:
                raise ValueError(
                    f"release_threshold ({release:g}) is above the threshold ({highest:g}); it "
                    "must not be higher."
                )
        for name in ("minimum_length_s", "median_filter_s"):
            seconds = getattr(self, name)
            _check_number(seconds, name)
            if seconds < 0:
                raise ValueError(f"{name} must be 0 or more, got {seconds:g}.")

    def of_labels(self, label_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The scores that start and that continue an event, (labels,) each."""
        if isinstance(self.threshold, Mapping):
            start = np.array([self.threshold.get(label, math.inf) for label in label_names])
        else:
            start = np.full(len(label_names), float(self.threshold))
        if self.release_threshold is None:
            return start, np.where(start > 0, _RELEASE * start, start)
        release = np.minimum(start, self.release_threshold)
        return start, np.where(np.isinf(start), start, release)


def find_events(
    windows: Iterable[Mapping[str, Any]],
    threshold: float | Mapping[str, float] = 0.5,
    release_threshold: float | None = None,
    minimum_length_s: float = 0.0,
    median_filter_s: float = 0.0,
) -> list[dict[str, Any]]:
    """Merge neighbouring windows that contain a label, with two thresholds (hysteresis).

    A run of neighbouring windows that score at least `release_threshold` is one event if at least
    one of them reaches `threshold`. The higher threshold decides whether there is an event, the
    lower one how far it extends, so a brief dip in the score does not split it.

    A window's score is placed at its middle and interpolated between middles. An event begins and
    ends where that line crosses the release threshold, within the windows' overlap. Times are
    therefore finer than the windows and their hop, and an event that fills half a window is not
    reported as filling all of it.

    Args:
        windows: what the pipeline returns under "windows" with `return_timestamps=True`, in order
            of time. A label missing from a window has no score there: call the pipeline with
            `top_k=None`.
        threshold: the score that makes an event: one number for all labels, or a dict of a number
            per label, in which case other labels make no events.
        release_threshold: the score that continues one; default: four fifths of `threshold`. Labels
            with a lower threshold than this use their threshold instead.
        minimum_length_s: shorter events are dropped, in seconds.
        median_filter_s: first replace each score by the median over this many seconds around it,
            which removes peaks and gaps shorter than half of that. 0: no filter.

    Returns:
        {"start": seconds, "end": seconds, "label": name, "score": highest of its windows}, sorted
        by start, then by label.

    Raises:
        ValueError: for a release threshold above the threshold, a negative length, or something
            that is not a number.
    """
    rules = EventRules(threshold, release_threshold, minimum_length_s, median_filter_s)
    windows = list(windows)
    names: dict[str, int] = {}
    for window in windows:
        for entry in window["labels"]:
            names.setdefault(entry["label"], len(names))
    scores = np.full((len(windows), len(names)), -math.inf)
    for row, window in zip(scores, windows, strict=True):
        for entry in window["labels"]:
            row[names[entry["label"]]] = entry["score"]
    spans = [(window["start"], window["end"]) for window in windows]
    return [event._asdict() for event in events_from_scores(spans, scores, list(names), rules)]


def events_from_scores(
    spans: Sequence[tuple[float, float]],
    scores: np.ndarray,
    label_names: Sequence[str],
    rules: EventRules,
) -> list[Event]:
    """`find_events` on arrays.

    Args:
        spans: each window's start and end in seconds, in order of time.
        scores: (windows, labels).
        label_names: in the order of the columns.
        rules: thresholds and the shortest length.
    """
    if not len(spans):
        return []
    territories = window_territories(spans)
    step_s = float(np.median(territories[:, 1] - territories[:, 0]))
    if rules.median_filter_s > step_s > 0:
        length = round(rules.median_filter_s / step_s)
        scores = median_filter(scores, length + 1 - length % 2)
    start_at, continue_at = rules.of_labels(label_names)
    # A gap between windows also ends an event.
    is_gap = np.array([True, *(b[0] > a[1] for a, b in itertools.pairwise(spans))])
    is_followed_by_window = np.concatenate([~is_gap[1:], [False]])
    events = []
    for column in np.flatnonzero((scores >= start_at).any(axis=0)):
        of_label = scores[:, column]
        is_heard = of_label >= continue_at[column]
        was_heard = np.concatenate([[False], is_heard[:-1]])
        first = np.flatnonzero(is_heard & (~was_heard | is_gap))
        goes_on = np.concatenate([is_heard[1:], [False]]) & is_followed_by_window
        last = np.flatnonzero(is_heard & ~goes_on)
        for begin, end in zip(first.tolist(), last.tolist(), strict=True):
            best = of_label[begin : end + 1].max()
            start, stop = spans[begin][0], spans[end][1]
            if not is_gap[begin]:
                start = _crossing(spans, of_label, begin - 1, begin, continue_at[column])
            if is_followed_by_window[end]:
                stop = _crossing(spans, of_label, end, end + 1, continue_at[column])
            event = Event(float(start), float(stop), label_names[int(column)], float(best))
            if best >= start_at[column] and event.end - event.start >= rules.minimum_length_s:
                events.append(event)
    return sorted(events, key=lambda event: (event.start, event.label))


def _crossing(
    spans: Sequence[tuple[float, float]], scores: np.ndarray, left: int, right: int, level: float
) -> float:
    """When the score crosses a level between two successive windows, within their overlap."""
    begin, end = spans[right][0], spans[left][1]
    if np.isinf(scores[left]) or np.isinf(scores[right]):  # missing: its score is unknown
        return (begin + end) / 2
    middles = [(spans[window][0] + spans[window][1]) / 2 for window in (left, right)]
    share = (level - scores[left]) / (scores[right] - scores[left])
    return min(max(middles[0] + share * (middles[1] - middles[0]), begin), end)


def window_territories(spans: Sequence[tuple[float, float]]) -> np.ndarray:
    """Each window's own part of the sound: overlaps are split down the middle.

    Args:
        spans: each window's start and end, in order.

    Returns:
        (windows, 2): start and end, in the same unit.
    """
    territories = np.array(spans, dtype=float).reshape(-1, 2)
    middle = (territories[1:, 0] + territories[:-1, 1]) / 2
    overlap = territories[1:, 0] < territories[:-1, 1]
    territories[1:, 0] = np.where(overlap, middle, territories[1:, 0])
    territories[:-1, 1] = np.where(overlap, middle, territories[:-1, 1])
    return territories


def _check_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}.")
