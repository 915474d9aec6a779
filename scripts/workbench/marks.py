"""Marks: what people hear, where; and what that means for an index's windows.

marks     CSV with the columns file, start, end, label; seconds; no start and end: the whole file
targets   (windows, labels)   1: present; 0: absent; NaN: unknown

A label is a name, several of them joined by `;`, `background` (none of the labels can be heard) or
`not NAME` (that one cannot; the others are unknown).
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from ..common.files import write_whole
from ..common.options import did_you_mean
from ..common.tables import csv_cell
from ..data.annotations import read_annotations

BACKGROUND = "background"
SEPARATOR = ";"
_NOT = "not "
_LOCAL_FILES = "/data/local-files/?d="  # of Label Studio
_COLUMNS = ["file", "start", "end", "label"]
_ENOUGH = 0.5  # of the mark or the window, whichever is shorter: the window then gets the label
_ALL = 0.95  # of a window must be marked as lacking a sound


class Mark(NamedTuple):
    """A stretch of a file, in seconds, and its label; None: the whole file."""

    file: str
    start: float | None
    end: float | None
    label: str

    @property
    def labels(self) -> list[str]:
        """The sounds marked as present."""
        if self.label == BACKGROUND or self.absent is not None:
            return []
        return [label.strip() for label in self.label.split(SEPARATOR) if label.strip()]

    @property
    def absent(self) -> str | None:
        """The sound marked as absent, with the others unknown."""
        return self.label[len(_NOT) :].strip() if self.label.startswith(_NOT) else None


def read_marks(path: Path) -> list[Mark]:
    """Marks from a CSV file, or from Label Studio's JSON export.

    Raises:
        ValueError: for a file that is neither, or an invalid row; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix.lower() == ".json":
        return _of_label_studio(path, text)
    # Strict: a quote that nobody closes would swallow all rows after it.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        missing = [name for name in ("file", "label") if name not in columns]
        if missing:
            raise ValueError(
                f"{path} has no column {missing[0]!r}: expected CSV with the columns "
                f"{', '.join(_COLUMNS)}, got {', '.join(columns) or 'an empty file'}."
            )
        return [
            _of_row(row, f"{path}, line {reader.line_num}")
            for row in reader
            if (row["label"] or "").strip()  # a queue's row that nobody has filled in
        ]
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: {error}.") from error


def marks_of_annotations(
    path: Path, sounds: Sequence[str], unmarked_is_background: bool, label_column: str | None = None
) -> tuple[list[Mark], str]:
    """What annotations in other programs' formats say (see `data.annotations`).

    Args:
        path: file or folder.
        sounds: of the index.
        unmarked_is_background: an annotated recording holds nothing but what is annotated.
        label_column: where it has an unusual name.

    Returns:
        marks, and a sentence about rows that are left out; "" when there are none.

    Raises:
        ValueError: as `read_annotations`.
    """
    found = read_annotations(path, sounds, label_column=label_column)
    marks = []
    for sound, annotations in found.of_recording.items():
        if unmarked_is_background or not annotations:
            marks.append(Mark(sound, None, None, BACKGROUND))
        marks += [Mark(sound, *annotation) for annotation in annotations]
    return marks, found.describe_problems()


def _of_row(row: dict[str, Any], where: str) -> Mark:
    file, label = (_as_it_was((row[name] or "").strip()) for name in ("file", "label"))
    if not file:
        raise ValueError(f"{where}: a mark needs a file.")
    start, end = (_seconds(row.get(name), f"{where}: {name}") for name in ("start", "end"))
    return _checked(Mark(file, start, end, label), where)


def _as_it_was(cell: str) -> str:
    """Text without the apostrophe that keeps it from being a formula (see `common.tables`)."""
    return cell[1:] if cell.startswith(("'=", "'+", "'-", "'@")) else cell


def _seconds(value: Any, where: str) -> float | None:
    if value is None or not str(value).strip():
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = float("nan")
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{where} must be seconds, 0 or more, got {value!r}.")
    return seconds


def _checked(mark: Mark, where: str) -> Mark:
    if (mark.start is None) != (mark.end is None):
        raise ValueError(f"{where}: give start and end, or neither for the whole file.")
    if mark.start is not None and mark.end is not None and mark.end <= mark.start:
        raise ValueError(
            f"{where}: it ends at {mark.end:g} s, before it starts ({mark.start:g} s)."
        )
    return mark


class MarkBook:
    """A CSV of marks that grows while somebody listens: each is on disk once `add` returns.

    Args:
        path: of the file; if it exists, its marks are read. It may have more columns, in any order.

    Raises:
        ValueError: as for `read_marks`, and for a file that is not CSV with all four columns.
    """

    def __init__(self, path: Path):
        if path.suffix.lower() == ".json":
            raise ValueError(f"{path}: marks are kept as CSV. Name a .csv file.")
        self.path = path
        self.marks = read_marks(path) if path.exists() and path.stat().st_size else []
        columns = self._columns()
        if missing := [name for name in _COLUMNS if name not in columns]:
            raise ValueError(
                f"{path} has no column {missing[0]!r}, and marks need one: add it, or name another "
                "file."
            )

    def _columns(self) -> list[str]:
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                return next(csv.reader(file), _COLUMNS)
        except FileNotFoundError:
            return _COLUMNS

    def add(self, mark: Mark) -> None:
        """Write one more mark."""
        _checked(mark, mark.file)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = _line(mark, self._columns())
        with self.path.open("ab+") as file:
            lead = ""
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lead = "" if file.read(1) == b"\n" else "\n"
            else:
                lead = ",".join(_COLUMNS) + "\n"
            # A single write: a kill leaves either the whole line or none.
            file.write((lead + line).encode())
            file.flush()
            os.fsync(file.fileno())
        self.marks.append(mark)

    def undo(self) -> Mark | None:
        """Undo the last mark and return it; None if there is none.

        Only its row leaves the file: somebody else may have written others since.

        Raises:
            ValueError: for a file that is no longer CSV; the mark is kept.
        """
        if not self.marks:
            return None
        mark = self.marks[-1]
        try:
            text = self.path.read_text(encoding="utf-8-sig")
            columns, *rows = csv.reader(io.StringIO(text, newline=""))
        except FileNotFoundError:
            write_marks(self.path, self.marks[:-1])
            return self.marks.pop()
        except (csv.Error, ValueError) as error:
            raise ValueError(f"Cannot take a mark back from {self.path}: {error}") from error
        for number in range(len(rows) - 1, -1, -1):
            if _holds(dict(zip(columns, rows[number], strict=False)), mark):
                del rows[number]
                break
        kept = "".join(_csv_line(row) for row in [columns, *rows])
        write_whole(self.path, lambda unfinished: unfinished.write_text(kept, encoding="utf-8"))
        return self.marks.pop()


def _holds(row: dict[str, str], mark: Mark) -> bool:
    """Whether a table's row is this mark, which it has with three decimals."""
    try:
        found = _of_row({name: row.get(name, "") for name in _COLUMNS}, "")
    except ValueError:
        return False
    return _line(found, _COLUMNS) == _line(mark, _COLUMNS)


def write_marks(path: Path, marks: Iterable[Mark]) -> None:
    """Marks as CSV, whole or not at all."""
    text = _csv_line(_COLUMNS) + "".join(_line(mark, _COLUMNS) for mark in marks)
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _line(mark: Mark, columns: Sequence[str]) -> str:
    cells = {"file": csv_cell(mark.file), "label": csv_cell(mark.label)}
    for name, value in (("start", mark.start), ("end", mark.end)):
        cells[name] = "" if value is None else f"{value:.3f}"
    return _csv_line([cells.get(column, "") for column in columns])


def _csv_line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def label_names(marks: Iterable[Mark]) -> list[str]:
    """The sounds named in marks, in alphabetical order."""
    names: set[str] = set()
    for mark in marks:
        names.update(mark.labels)
        if mark.absent is not None:
            names.add(mark.absent)
    return sorted(names)


def match_files(marks: Iterable[Mark], sounds: Sequence[str]) -> dict[str, str]:
    """The names of the marks' files in an index.

    A file is found by its name there, or by the end of its path if that is unique, so marks made
    elsewhere, or with paths relative to another folder, work.

    Raises:
        ValueError: for a file that is not in the index, or that is ambiguous.
    """
    known = set(sounds)
    by_name: dict[str, list[str]] = {}
    for sound in sounds:
        by_name.setdefault(PurePath(sound).name, []).append(sound)
    found: dict[str, str] = {}
    for mark in marks:
        if mark.file in found:
            continue
        if mark.file in known:
            found[mark.file] = mark.file
            continue
        parts = PurePath(mark.file).parts
        candidates = by_name.get(PurePath(mark.file).name, [])
        fitting = []
        for candidate in candidates:
            shared = min(len(parts), len(PurePath(candidate).parts))
            if PurePath(candidate).parts[-shared:] == parts[-shared:]:
                fitting.append(candidate)
        if not fitting:
            raise ValueError(
                f"The marks name {mark.file}, which is not in the index"
                f"{did_you_mean(mark.file, list(sounds)[:10])} Add it: ast-index {mark.file} "
                "--output INDEX."
            )
        if len(fitting) > 1:
            raise ValueError(
                f"{mark.file} may be {fitting[0]} or {fitting[1]} in the index: give more of its "
                "path."
            )
        found[mark.file] = fitting[0]
    return found


def window_targets(
    marks: Sequence[Mark],
    sounds: Sequence[str],
    sound_of_window: np.ndarray,
    spans: np.ndarray,
    labels: Sequence[str],
) -> np.ndarray:
    """What marks say about an index's windows.

    A window gets a label if the mark covers half of the window, or half of the mark is in it. The
    labels marked in a window are all there is in it; a label that only touches it is unknown there.
    A window without marks stays unlabelled. `background` and `not NAME` apply to windows they cover
    completely, and a label's mark overrides them.

    Args:
        marks: in the order they were made.
        sounds: names of the index's sounds.
        sound_of_window: (windows,) positions in `sounds`.
        spans: (windows, 2) seconds.
        labels: the columns' names.

    Returns:
        targets (windows, labels) float32.

    Raises:
        ValueError: as for `match_files`.
    """
    names = match_files(marks, sounds)
    order = np.argsort(sound_of_window, kind="stable")
    firsts = np.searchsorted(sound_of_window[order], np.arange(len(sounds) + 1))
    place = {sound: number for number, sound in enumerate(sounds)}
    column = {label: number for number, label in enumerate(labels)}

    shape = (len(spans), len(labels))
    present, touched, absent = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
    reviewed = np.zeros(len(spans), bool)
    for mark in marks:
        number = place[names[mark.file]]
        windows = order[firsts[number] : firsts[number + 1]]
        starts, ends = spans[windows, 0], spans[windows, 1]
        start = -np.inf if mark.start is None else mark.start
        end = np.inf if mark.end is None else mark.end
        overlap = np.minimum(ends, end) - np.maximum(starts, start)
        lengths = ends - starts
        if mark.labels:
            hit = windows[overlap >= _ENOUGH * np.minimum(lengths, end - start)]
            columns = [column[label] for label in mark.labels if label in column]
            reviewed[hit] = True
            for label in columns:
                present[hit, label] = True
                touched[windows[overlap > 0], label] = True
            continue
        within = windows[overlap >= _ALL * lengths]
        if mark.absent is None:
            reviewed[within] = True
        elif mark.absent in column:
            absent[within, column[mark.absent]] = True
    targets = np.full(shape, np.nan, np.float32)
    targets[reviewed] = 0
    targets[touched] = np.nan
    targets[absent] = 0
    targets[present] = 1
    return targets


def to_label_studio(
    marks: Iterable[Mark], scores: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """Label Studio tasks, one per file, with the marks as predictions to check.

    Files that are here get the address at which Label Studio serves local files, with `/` as their
    root (LOCAL_FILES_DOCUMENT_ROOT); other sounds keep their name.

    Args:
        marks: stretches with labels.
        scores: one per mark.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for number, mark in enumerate(marks):
        task = tasks.setdefault(
            mark.file,
            {
                "data": {"audio": _address(mark.file)},
                "predictions": [{"model_version": "ast", "result": []}],
            },
        )
        region: dict[str, Any] = {
            "id": f"ast{number}",
            "from_name": "label",
            "to_name": "audio",
            "type": "labels",
            "value": {"start": mark.start, "end": mark.end, "labels": mark.labels or [mark.label]},
        }
        if scores is not None:
            region["score"] = float(scores[number])
        task["predictions"][0]["result"].append(region)
    return list(tasks.values())


def _address(file: str) -> str:
    if not Path(file).exists():
        return file
    return _LOCAL_FILES + quote(Path(file).absolute().as_posix().lstrip("/"))


def _of_label_studio(path: Path, text: str) -> list[Mark]:
    """The annotations of Label Studio's JSON export (not its predictions)."""
    try:
        tasks = json.loads(text)
        marks = []
        for task in tasks:
            address = next(value for value in task["data"].values() if isinstance(value, str))
            _, local, rest = address.rpartition("?d=")
            # What was uploaded in the browser has eight digits and a dash before its name.
            file = unquote(rest) if local else re.sub(r"^.*/upload/.*/[0-9a-f]{8}-", "", address)
            for annotation in task.get("annotations", ()):
                if annotation.get("was_cancelled"):
                    continue
                for region in annotation["result"]:
                    value = region.get("value", {})
                    names = value.get("labels") or value.get("choices")
                    if names:
                        where = f"{path}, {file}"
                        start, end = (_seconds(value.get(n), where) for n in ("start", "end"))
                        label = SEPARATOR.join(map(str, names))
                        marks.append(_checked(Mark(file, start, end, label), where))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is not a JSON export of Label Studio: {error}") from error
    return marks
