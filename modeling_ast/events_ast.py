"""Merges the windows of a long recording into events: what was heard, from when to when.

windows   [{"start", "end", "labels": [{"score", "label"}, …]}, …]   the pipeline's, overlapping
scores    (windows, labels)                                          the same, as an array
events    [Event(start, end, label, score), …]                       seconds, in order of time
"""

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
    stream = EventStream(label_names, rules)
    events = []
    for span, of_window in zip(spans, scores, strict=True):
        events += stream.add(span, of_window)[1]
    return sorted([*events, *stream.close()], key=lambda event: (event.start, event.label))


@dataclass
class _Run:
    """Neighbouring windows in which a label scores enough to continue an event."""

    start: float  # seconds
    best: float
    is_told: bool = False  # that it is an event


class EventStream:
    """Events while the sound goes on, window by window: those of `find_events`, without its filter.

    Holds one window, however long the sound is.

    Args:
        label_names: in the order of the scores.
        rules: thresholds and the shortest length; `median_filter_s` is not looked at, as it needs
            the windows to come.
    """

    def __init__(self, label_names: Sequence[str], rules: EventRules):
        self.label_names = label_names
        self.rules = rules
        self._start_at, self._continue_at = rules.of_labels(label_names)
        self._runs: dict[int, _Run] = {}  # by label
        self._span: tuple[float, float] | None = None  # of the last window
        self._scores = np.empty(0)

    def add(self, span: tuple[float, float], scores: np.ndarray) -> tuple[list[Event], list[Event]]:
        """One more window.

        Args:
            span: from when to when, in seconds; windows come in order.
            scores: (labels,).

        Returns:
            The events that begin with it, up to its end, and those that are over.
        """
        is_gap = self._span is None or span[0] > self._span[1]
        heard = set(np.flatnonzero(scores >= self._continue_at).tolist())
        ended = []
        for label in [label for label in self._runs if is_gap or label not in heard]:
            end = None if is_gap else self._crossing(label, span, scores)
            ended += self._end(label, end)
        begun = []
        for label in sorted(heard):
            score = float(scores[label])
            run = self._runs.get(label)
            if run is None:
                start = span[0] if is_gap else self._crossing(label, span, scores)
                run = self._runs[label] = _Run(float(start), score)
            run.best = max(run.best, score)
            # An event never ends before the middle of a window in which it is heard.
            surely = sum(span) / 2 - run.start
            if not run.is_told and self._is_event(label, run, surely):
                run.is_told = True
                begun.append(Event(run.start, span[1], self.label_names[label], run.best))
        self._span, self._scores = span, scores
        return begun, ended

    def close(self) -> list[Event]:
        """The sound is over, and all events with it."""
        return [event for label in list(self._runs) for event in self._end(label, None)]

    def _is_event(self, label: int, run: _Run, length: float) -> bool:
        return run.best >= self._start_at[label] and length >= self.rules.minimum_length_s

    def _end(self, label: int, end: float | None) -> list[Event]:
        """A run is over, at the end of the last window unless it is said when."""
        assert self._span is not None
        run = self._runs.pop(label)
        end = float(self._span[1] if end is None else end)
        if not self._is_event(label, run, end - run.start):
            return []
        return [Event(run.start, end, self.label_names[label], run.best)]

    def _crossing(self, label: int, span: tuple[float, float], scores: np.ndarray) -> float:
        """When the score goes through the release threshold on its way to this window."""
        assert self._span is not None
        return _crossing(
            self._span, self._scores[label], span, scores[label], self._continue_at[label]
        )


def _crossing(
    left: tuple[float, float],
    left_score: float,
    right: tuple[float, float],
    right_score: float,
    level: float,
) -> float:
    """When the score crosses a level between two successive windows, within their overlap."""
    begin, end = right[0], left[1]
    if np.isinf(left_score) or np.isinf(right_score):  # missing: its score is unknown
        return (begin + end) / 2
    middles = sum(left) / 2, sum(right) / 2
    share = (level - left_score) / (right_score - left_score)
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
