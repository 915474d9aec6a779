"""Windows of a long sound merged into events: what was heard from when to when.

windows   [{"start", "end", "labels": [{"score", "label"}, …]}, …]   the pipeline's, overlapping
events    [{"start", "end", "label", "score"}, …]                    seconds, in order of time
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def find_events(
    windows: Iterable[Mapping[str, Any]],
    threshold: float | Mapping[str, float] = 0.5,
    release_threshold: float | None = None,
    minimum_length_s: float = 0.0,
) -> list[dict[str, Any]]:
    """Merge neighbouring windows in which a label is heard, by thresholds with hysteresis.

    A run of neighbouring windows that score at least `release_threshold` is one event of a label
    when at least one of them reaches `threshold`: the higher one decides whether there is an event,
    the lower one how far it reaches, so that a score that dips for a moment does not cut it in two.

    Args:
        windows: what the pipeline returns under "windows" with `return_timestamps=True`, in order
            of time. A label that a window does not name scores nothing there: ask the pipeline for
            `top_k=None`.
        threshold: the score that makes an event; a number for all labels, or one for each label of
            interest by name, and then other labels make no events.
        release_threshold: the score that continues one; default: `threshold`. A label whose
            threshold is lower than this number takes its threshold.
        minimum_length_s: shorter events are left out, in seconds. An event is at least one window
            long.

    Returns:
        {"start": seconds, "end": seconds, "label": name, "score": highest of its windows}, by
        start, then by label.

    Raises:
        ValueError: for a release threshold above the threshold, a negative length, or a number
            that is none.
    """
    thresholds = threshold if isinstance(threshold, Mapping) else {"threshold": threshold}
    for name, value in thresholds.items():
        _check_number(value, f"The threshold of {name!r}" if thresholds is threshold else name)
    if release_threshold is not None:
        _check_number(release_threshold, "release_threshold")
        if release_threshold > max(thresholds.values(), default=math.inf):
            raise ValueError(
                f"release_threshold ({release_threshold:g}) is above the threshold "
                f"({max(thresholds.values()):g}); it must be equal or lower."
            )
    _check_number(minimum_length_s, "minimum_length_s")
    if minimum_length_s < 0:
        raise ValueError(f"minimum_length_s must be 0 or more, got {minimum_length_s:g}.")

    events = []
    going_on: dict[str, dict[str, Any]] = {}  # label -> the event that may reach further

    def finish(label: str) -> None:
        event = going_on.pop(label)
        long_enough = event["end"] - event["start"] >= minimum_length_s
        if long_enough and event["score"] >= _of_label(threshold, label):
            events.append(event)

    for window in windows:
        scores = {entry["label"]: entry["score"] for entry in window["labels"]}
        heard = set()
        for label, score in scores.items():
            needed = _of_label(threshold, label)
            if release_threshold is not None:
                needed = min(needed, release_threshold if needed < math.inf else needed)
            if score >= needed:
                heard.add(label)
        for label in [*going_on]:
            # A gap between windows ends an event, too.
            if label not in heard or window["start"] > going_on[label]["end"]:
                finish(label)
        for label in heard:
            event = going_on.setdefault(
                label,
                {
                    "start": window["start"],
                    "end": window["end"],
                    "label": label,
                    "score": -math.inf,
                },
            )
            event["end"] = window["end"]
            event["score"] = max(event["score"], scores[label])
    for label in [*going_on]:
        finish(label)
    return sorted(events, key=lambda event: (event["start"], event["label"]))


def _of_label(threshold: float | Mapping[str, float], label: str) -> float:
    return threshold.get(label, math.inf) if isinstance(threshold, Mapping) else threshold


def _check_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}.")
