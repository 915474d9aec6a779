"""Results as `ast-classify` prints them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ..common.shown import clock, shown
from .parts import Result

# A sound this many times as long as a window holds more than one thing: list what was heard when.
_LONG = 2.0
_MOST_EVENTS = 30


def format_results(results: Iterable[Result], per: str) -> str:
    """The readable sounds' labels with their scores in per cent, best first; for a long sound, what
    was heard when."""
    blocks: list[str] = []
    rows: list[tuple[str, str, str]] = []

    def flush() -> None:
        if rows:
            width = max(len(name) for name, _, _ in rows)
            blocks.append("\n".join(f"{n:<{width}}  {score}  {label}" for n, score, label in rows))
            rows.clear()

    for result in results:
        if result.error is not None:
            continue
        name = shown(result.sound)
        if per == "window":
            for window in result.windows:
                span = f"{window.start:8.2f} – {window.end:8.2f} s"
                rows += _rows(f"{name}  {span}", window.labels)
        elif is_long(result):
            flush()
            blocks.append(_timetable(name, result))
        else:
            rows += _rows(name, result.labels)
    flush()
    return "\n".join(blocks)


def format_json(results: Iterable[Result], per: str) -> str:
    """A JSON array with an object per sound."""
    return json.dumps([_object(r, per) for r in results], indent=2, ensure_ascii=False)


def is_long(result: Result) -> bool:
    """Whether the mean over the whole sound says less than its parts."""
    if not result.windows:
        return False
    first = result.windows[0]
    return result.duration > _LONG * (first.end - first.start)


def _rows(name: str, labels: Sequence[Any]) -> list[tuple[str, str, str]]:
    return [
        (name if rank == 0 else "", f"{100 * label.score:5.1f} %", shown(label.label))
        for rank, label in enumerate(labels)
    ]


def _timetable(name: str, result: Result) -> str:
    lines = [f"{name}, {clock(result.duration)}:"]
    times = [f"{clock(e.start, 1)} – {clock(e.end, 1)}" for e in result.events[:_MOST_EVENTS]]
    width = max(map(len, times), default=0)
    for when, event in zip(times, result.events, strict=False):
        lines.append(f"  {when:>{width}}  {100 * event.score:5.1f} %  {shown(event.label)}")
    more = len(result.events) - len(times)
    if more:
        lines.append(f"  … and {more} more; --output FOLDER writes them all")
    if not result.events:
        score, window, label = max(
            (label.score, window, label.label)
            for window in result.windows
            for label in window.labels
        )
        lines.append(
            f"  nothing reaches the threshold; the highest score is {100 * score:.1f} %, "
            f"{shown(label)}, {clock(window.start, 1)} – {clock(window.end, 1)}"
        )
    mean = ", ".join(f"{shown(label)} {100 * score:.1f} %" for score, label in result.labels)
    lines.append(f"  on average: {mean}")
    return "\n".join(lines)


def _object(result: Result, per: str) -> dict[str, Any]:
    if result.error is not None:
        return {"file": result.sound, "error": result.error}
    found: dict[str, Any] = {"file": result.sound, "duration": result.duration}
    found["events"] = [event._asdict() for event in result.events]
    found["labels"] = [label._asdict() for label in result.labels]
    if per == "window":
        found["windows"] = [
            {
                "start": window.start,
                "end": window.end,
                "labels": [label._asdict() for label in window.labels],
            }
            for window in result.windows
        ]
    return found
