"""The file formats for results: to add one, add an entry to `FORMATS`.

A table holds the rows of all sounds; a track is one file per sound, with its events, for a program
that displays them; some programs take one file with all events.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import write_whole
from ..common.tables import write_csv

if TYPE_CHECKING:
    from modeling_ast.events_ast import Event

_ROWS_AT_ONCE = 10_000
_HIGHEST_HZ = 8000  # the highest frequency for a model at 16 kHz

Columns = Mapping[str, str]  # name -> "string", "double", "float" or "vector" of floats
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Format:
    """A table of all sounds, a track per sound, or a file of all events.

    Args:
        table: writes a file: path, columns, rows.
        events: writes a file: path, rows of events.
        track: returns a sound's events as text.
        suffix: of a track, or of the file of events.
    """

    table: Callable[[Path, Columns, Rows], None] | None = None
    events: Callable[[Path, Rows], None] | None = None
    track: Callable[[Sequence["Event"]], str] | None = None
    suffix: str = ""


def _write_csv(path: Path, columns: Columns, rows: Rows) -> None:
    write_csv(path, list(columns), rows)


def _write_json(path: Path, columns: Columns, rows: Rows) -> None:
    """One array, one row per line."""

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                file.write(",\n" if number else "[\n")
                rounded = {k: round(x, 6) if isinstance(x, float) else x for k, x in row.items()}
                file.write(json.dumps(rounded, ensure_ascii=False))
            file.write("\n]\n" if file.tell() else "[]\n")

    write_whole(path, write)


def write_parquet(
    path: Path, columns: Columns, rows: Rows, metadata: Mapping[str, str] | None = None
) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    types = {
        "string": pyarrow.string(),
        "double": pyarrow.float64(),
        "float": pyarrow.float32(),
        "vector": pyarrow.list_(pyarrow.float32()),
    }
    fields = [(name, types[kind]) for name, kind in columns.items()]
    schema = pyarrow.schema(fields, None if metadata is None else dict(metadata))

    def write(unfinished: Path) -> None:
        remaining = iter(rows)
        with ParquetWriter(unfinished, schema) as writer:
            while some := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
                writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))

    write_whole(path, write)


def _audacity(events: Sequence["Event"]) -> str:
    """A label track for File > Import > Labels: start, end and text, separated by tabs."""
    return "".join(f"{e.start:.6f}\t{e.end:.6f}\t{_one_line(e.label)}\n" for e in events)


def _raven(events: Sequence["Event"]) -> str:
    """A selection table for File > Open Sound Selection Table; boxes span the model's full band."""
    columns = ["Selection", "View", "Channel", "Begin Time (s)", "End Time (s)"]
    columns += ["Low Freq (Hz)", "High Freq (Hz)", "Label", "Score"]
    lines = ["\t".join(columns) + "\n"]
    for number, event in enumerate(events, start=1):
        span = f"{event.start:.6f}\t{event.end:.6f}\t0\t{_HIGHEST_HZ}"
        lines.append(
            f"{number}\tSpectrogram 1\t1\t{span}\t{_one_line(event.label)}\t{event.score:.4f}\n"
        )
    return "".join(lines)


def _label_studio(path: Path, rows: Rows) -> None:
    """Tasks for Label Studio's Import, with the events as predictions to check."""
    from ..workbench.marks import Mark, to_label_studio

    events = list(rows)
    marks = [Mark(row["sound"], row["start"], row["end"], row["label"]) for row in events]
    tasks = to_label_studio(marks, [row["score"] for row in events])
    text = json.dumps(tasks, indent=2, ensure_ascii=False)
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _one_line(label: str) -> str:
    return " ".join(label.split())


FORMATS = {
    "csv": Format(table=_write_csv),
    "json": Format(table=_write_json),
    "parquet": Format(table=write_parquet),
    "audacity": Format(track=_audacity, suffix=".txt"),
    "label_studio": Format(events=_label_studio, suffix=".json"),
    "raven": Format(track=_raven, suffix=".Table.1.selections.txt"),
}
