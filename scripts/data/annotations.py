"""Annotations: what can be heard from when to when, in the formats people and programs write.

    Raven       selection table: tab-separated, "Begin Time (s)", "End Time (s)", a label column
    Audacity    label track: start, end, label, tab-separated, without a header
    DCASE       TSV: filename, onset, offset, event_label
    CSV         file, start, end, label; also what `ast-classify` writes: sound, start, end, label

    one file that names its recordings, or a folder of files, one per recording, matched by name:
    bird.wav -> bird.txt, bird.wav.txt, bird.Table.1.selections.txt

    -> {recording: [Annotation(start, end, label), …]}, seconds, by start; and what is wrong with
       skipped rows, with their line numbers

The first line tells the format, not the suffix. An annotation file without rows means that nothing
can be heard in its recording; so does a DCASE row with only a file name.
"""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

_SUFFIXES = (".txt", ".tsv", ".csv")
# In lower case; the first one found in a header counts.
_FILE_COLUMNS = ("file", "filename", "sound", "path", "recording", "begin path", "begin file")
_START_COLUMNS = ("start", "onset", "begin time (s)", "start (s)")
_END_COLUMNS = ("end", "offset", "end time (s)", "end (s)")
_LABEL_COLUMNS = (
    "label", "event_label", "event label", "annotation", "species", "species code", "class",
    "common name", "tag",
)  # fmt: skip
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # `write_csv` puts an apostrophe before these
_TOLERANCE_S = 0.05  # an end may be this far past the sound's: programs round differently
_SHOWN = 20


class Annotation(NamedTuple):
    """A label present from `start` to `end`, in seconds."""

    start: float
    end: float
    label: str


def without_overlaps(annotations: Iterable[Annotation]) -> list[Annotation]:
    """By start; of one label, those that overlap or touch as one."""
    merged: list[Annotation] = []
    for event in sorted(annotations, key=lambda event: (event.label, event.start)):
        if merged and merged[-1].label == event.label and event.start <= merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(merged[-1].end, event.end))
        else:
            merged.append(event)
    return sorted(merged)


class _Row(NamedTuple):
    """A row as written in a file."""

    line: int
    file: str | None  # None: the annotation file's own name tells
    start: str
    end: str
    label: str

    @property
    def says_nothing_is_heard(self) -> bool:
        """Only a file name, as in DCASE: nothing can be heard."""
        return self.start.lower() in ("", "nan") and self.label.lower() in ("", "nan")


@dataclass
class Annotations:
    """The result of reading annotations.

    Args:
        of_recording: recording -> its annotations by start, without duplicates; recordings without
            annotations are missing.
        problems: a sentence for each skipped row or file, with file and line.
        rows: how many were read, including skipped ones.
    """

    of_recording: dict[str, list[Annotation]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    rows: int = 0

    @property
    def label_names(self) -> list[str]:
        """All labels, sorted."""
        return sorted({a.label for events in self.of_recording.values() for a in events})

    def describe_problems(self) -> str:
        """What was skipped, for people; "" if nothing was."""
        if not self.problems:
            return ""
        more = len(self.problems) - _SHOWN
        return (
            f"Annotations skipped: {len(self.problems)}. "
            + " ".join(self.problems[:_SHOWN])
            + (f" And {more} more." if more > 0 else "")
        )


def read_annotations(
    path: str | Path,
    recordings: Iterable[str],
    duration_of: Callable[[str], float | None] | None = None,
    label_column: str | None = None,
) -> Annotations:
    """Read annotations of known recordings.

    Args:
        path: a file that names its recordings, or a folder of such files or of one file per
            recording, with or without sub-folders; it can also hold the recordings.
        recordings: their names: paths, or what a dataset calls them.
        duration_of: returns a recording's length in seconds, or None if unknown; called only for
            annotated ones.
        label_column: the column with the label, if it has an unusual name.

    Raises:
        ValueError: if there is no such file or folder, if a table has no label column, or if
            nothing in it belongs to these recordings; the message says why.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"No such file or folder of annotations: {path}")
    files = [path]
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()
        )
        if not files:
            raise ValueError(
                f"{path} holds no annotations: expected Raven selection tables or Audacity label "
                "tracks (.txt), TSV or CSV files."
            )
    found = Annotations()
    names = _Names(recordings)
    durations: dict[str, float | None] = {}
    for file in files:
        rows = list(_read_rows(file, label_column))
        own_name = None
        if not rows or rows[0].file is None:
            own_name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            recording = names.of_track(own_name)
            if recording is None:
                found.problems.append(f"The name of {file} matches none of the recordings.")
                continue
            found.of_recording.setdefault(recording, [])
        for row in rows:
            found.rows += 1
            where = f"{file}, line {row.line}"
            recording = names.of_file(row.file) if row.file is not None else recording
            if recording is None:
                found.problems.append(
                    f"{where}: {row.file!r} matches none of the recordings, or several."
                )
                continue
            if row.file is not None and row.says_nothing_is_heard:
                found.of_recording.setdefault(recording, [])
                continue
            if recording not in durations:
                durations[recording] = None if duration_of is None else duration_of(recording)
            annotation = _checked(row, durations[recording])
            if isinstance(annotation, str):
                found.problems.append(f"{where}: {annotation}")
                continue
            found.of_recording.setdefault(recording, []).append(annotation)
    if not found.of_recording:
        raise ValueError(
            f"Nothing in {path} belongs to these recordings. {found.describe_problems()}"
        )
    for recording, annotations in found.of_recording.items():
        found.of_recording[recording] = sorted(set(annotations))
    return found


def _checked(row: _Row, duration: float | None) -> Annotation | str:
    """The annotation, or what is wrong with it."""
    try:
        # Programs write numbers in their user's locale.
        start, end = (float(text.replace(",", ".")) for text in (row.start, row.end))
    except ValueError:
        start = end = math.nan
    if not (math.isfinite(start) and math.isfinite(end)):
        return f"start {row.start!r} and end {row.end!r} must be times in seconds."
    if not row.label:
        return "there is no label."
    if end <= start:
        return f"it ends at {end:g} s but starts at {start:g} s."
    if start < 0 or (duration is not None and start >= duration):
        of = "" if duration is None else f", which lasts {duration:g} s"
        return f"it starts at {start:g} s, outside the sound{of}."
    if duration is not None and end > duration:
        if end > duration + _TOLERANCE_S:
            return f"it ends at {end:g} s, after the end of the sound, which lasts {duration:g} s."
        end = duration
    return Annotation(start, end, row.label)


def _read_rows(file: Path, label_column: str | None) -> Iterator[_Row]:
    """The rows of a file in any of the formats."""
    try:
        yield from _rows_of(file, label_column)
    except csv.Error as error:
        raise ValueError(f"Cannot read the annotations {file}: {error}.") from error


def _rows_of(file: Path, label_column: str | None) -> Iterator[_Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the annotations {file}: {error}") from error
    lines = text.splitlines()
    if not text.strip():
        return
    delimiter = next((mark for mark in ("\t", ";") if mark in lines[0]), ",")
    # Tab-separated files do not quote: a label can be 5" or "A".
    rows = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,  # a quote that nobody closes would swallow all rows after it
    )
    header = [name.strip() for name in next(rows)]
    if _is_number(header[0]):
        if delimiter != "\t":
            raise ValueError(
                f"{file} has no header: expected one that names the columns, e.g. "
                "file,start,end,label."
            )
        yield from _audacity_rows(lines)
        return
    place = {name.lower(): number for number, name in reversed([*enumerate(header)])}
    start, end = _column(place, _START_COLUMNS), _column(place, _END_COLUMNS)
    wanted = _LABEL_COLUMNS if label_column is None else (label_column.lower(),)
    label = _column(place, wanted)
    if start is None or end is None or label is None:
        missing = "label" if None not in (start, end) else "start and end"
        raise ValueError(
            f"{file} has no column for the {missing}; its columns are {', '.join(header)}. "
            "Expected a Raven selection table, an Audacity label track, or a table with the "
            "columns file, start, end, label (--annotation_label_column names another)."
        )
    of_file = _column(place, _FILE_COLUMNS)
    view, seen = place.get("view"), set()
    for line, cells in enumerate(rows, start=2):
        if not any(cell.strip() for cell in cells):
            continue
        cells += [""] * (len(header) - len(cells))
        row = _Row(
            line,
            None if of_file is None else _unescaped(cells[of_file]),
            cells[start].strip(),
            cells[end].strip(),
            _unescaped(cells[label]),
        )
        # Raven writes a selection once for each view that shows it.
        if view is not None and row[1:] in seen:
            continue
        seen.add(row[1:])
        yield row


def _audacity_rows(lines: Sequence[str]) -> Iterator[_Row]:
    for line, text in enumerate(lines, start=1):
        # A line that starts with a backslash holds the frequencies of the line before.
        if text.strip() and not text.startswith("\\"):
            start, end, label = [*text.split("\t", 2), "", ""][:3]
            yield _Row(line, None, start.strip(), end.strip(), label.strip())


def _column(place: dict[str, int], names: Sequence[str]) -> int | None:
    return next((place[name] for name in names if name in place), None)


def _unescaped(text: str) -> str:
    text = text.strip()
    return text[1:] if text[:1] == "'" and text[1:2] in _FORMULA_STARTS else text


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


class _Names:
    """Finds recordings by the names in annotations: a path or its end, with or without suffix."""

    def __init__(self, recordings: Iterable[str]):
        self._by_end: dict[str, set[str]] = {}
        for recording in recordings:
            path = PurePath(recording)
            for name in {path.name, path.stem}:
                self._by_end.setdefault(name, set()).add(recording)

    def of_file(self, name: str) -> str | None:
        """The recording that a row calls `name`; None if there is none, or more than one."""
        wanted = PurePath(name.replace("\\", "/"))
        found = self._by_end.get(wanted.name, set()) | self._by_end.get(wanted.stem, set())
        if name in found:
            return name
        # If several folders have one by that name: the one with most folders in common.
        common = {recording: _common_end(wanted, PurePath(recording)) for recording in found}
        best = [r for r, length in common.items() if length == max(common.values())]
        return best[0] if len(best) == 1 else None

    def of_track(self, name: str) -> str | None:
        """The recording of an annotation file: bird.txt, bird.wav.txt, bird.Table.1.…"""
        path = PurePath(name)
        stem = path.name
        while "." in stem.lstrip("."):
            stem = stem.rpartition(".")[0]
            if recording := self.of_file((path.parent / stem).as_posix()):
                return recording
        return None


def _common_end(a: PurePath, b: PurePath) -> int:
    pairs = zip(
        reversed((*a.parent.parts, a.stem)), reversed((*b.parent.parts, b.stem)), strict=False
    )
    length = 0
    for one, other in pairs:
        if one != other:
            break
        length += 1
    return length
