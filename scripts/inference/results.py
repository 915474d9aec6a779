"""Results of many sounds: written in parts as they come, and put together at the end.

    OUTPUT/settings.json            what the results depend on; a restart must have the same
    OUTPUT/parts/rank00000-000000.parquet   one row per sound; a part is there whole or not at all
    OUTPUT/windows.csv, events.csv, …       made from the parts: `collect`

Any number of processes, one after the other or at the same time, write parts of their own into one
folder. What a killed one had not written is missing from the parts, and is done by the next one.
"""

import csv
import itertools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_LABELS = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))
_EVENT = [
    ("start", pa.float64()),
    ("end", pa.float64()),
    ("label", pa.string()),
    ("score", pa.float32()),
]
_WINDOW = [
    ("start", pa.float64()),
    ("end", pa.float64()),
    ("labels", _LABELS),
]
PART = pa.schema(
    [
        ("sound", pa.string()),
        ("duration", pa.float64()),  # seconds
        ("error", pa.string()),  # null: there was none
        ("labels", _LABELS),  # of the whole sound, best first
        ("windows", pa.list_(pa.struct(_WINDOW))),
        ("events", pa.list_(pa.struct(_EVENT))),
        ("embeddings", pa.list_(pa.list_(pa.float32()))),  # one per window, or none
    ]
)
_EVENTS = pa.schema([("sound", pa.string()), *_EVENT])
_ROWS_AT_ONCE = 10_000

TABLE_FORMATS = ("csv", "json", "parquet")
TRACK_FORMATS = ("audacity", "raven")

Row = dict[str, Any]


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the results depend on, or compare it with what is there.

    Raises:
        ValueError: when the folder holds results of other settings.
    """
    path = folder / "settings.json"
    text = json.dumps(settings, indent=2, sort_keys=True)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(text)
    changed = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if changed:
        key = sorted(changed)[0]
        raise ValueError(
            f"{folder} holds results with {key} {found.get(key)!r}, this run has "
            f"{wanted.get(key)!r}. Choose another --output, or remove that folder."
        )


class Parts:
    """The parts in an output folder; this process writes those of its rank."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder / "parts"
        self.rank = rank
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = [int(path.stem.split("-")[1]) for path in self.folder.glob(f"{self._prefix}*")]
        self._numbers = itertools.count(max(taken, default=-1) + 1)

    @property
    def _prefix(self) -> str:
        return f"rank{self.rank:05d}-"

    def write(self, rows: list[Row]) -> None:
        """Write one part with a row of `PART` per sound; after a crash it is whole or absent."""
        table = pa.Table.from_pylist(rows, schema=PART)
        path = self.folder / f"{self._prefix}{next(self._numbers):06d}.parquet"
        _replace(path, lambda unfinished: pq.write_table(table, unfinished))

    def done(self) -> set[str]:
        """Names of the sounds that need not be classified again: all but those with errors."""
        names: set[str] = set()
        for path in self._paths():
            table = pq.read_table(path, columns=["sound", "error"])
            names.update(table.filter(table["error"].is_null())["sound"].to_pylist())
        return names

    def rows(self, errors: bool = False, embeddings: bool = False) -> Iterator[Row]:
        """Rows of `PART`, each sound once: those that were classified, or those that failed.

        With `embeddings`, that is an array (windows, D); without, it is not read.
        """
        seen = self.done() if errors else set()
        columns = [name for name in PART.names if name != "embeddings"]
        for path in self._paths():
            table = pq.read_table(path, columns=PART.names if embeddings else columns)
            for index, row in enumerate(table.select(columns).to_pylist()):
                if (row["error"] is not None) == errors and row["sound"] not in seen:
                    seen.add(row["sound"])
                    if embeddings:
                        vectors = table["embeddings"][index].values
                        row["embeddings"] = vectors.flatten().to_numpy().reshape(len(vectors), -1)
                    yield row

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("rank*.parquet"))


def collect(
    folder: Path, per: str, formats: Iterable[str], top_k: int, embeddings: bool
) -> dict[str, str]:
    """Make the files that people read from the parts.

    Args:
        folder: the output folder.
        per: "window" or "file": what a row of the table and of the embeddings is.
        formats: of `TABLE_FORMATS` and `TRACK_FORMATS`.
        top_k: labels in a row.
        embeddings: also write embeddings.parquet.

    Returns:
        errors: name of the sound -> what was wrong.
    """
    parts = Parts(folder)
    for name in formats:
        if name in TABLE_FORMATS:
            write = {"csv": _write_csv, "json": _write_json, "parquet": _write_parquet}[name]
            table = _schema(per, top_k)
            write(folder / f"{per}s.{name}", _table_rows(parts.rows(), per, top_k), table)
            write(folder / f"events.{name}", _event_rows(parts.rows()), _EVENTS)
        else:
            write_track = {"audacity": _write_audacity, "raven": _write_raven}[name]
            for row in parts.rows():
                write_track(folder / name, row)
    if embeddings:
        schema = pa.schema(
            [("sound", pa.string()), *_span(per), ("embedding", pa.list_(pa.float32()))]
        )
        rows = _embedding_rows(parts.rows(embeddings=True), per)
        _write_parquet(folder / "embeddings.parquet", rows, schema)
    errors = {row["sound"]: row["error"] for row in parts.rows(errors=True)}
    error_file = folder / "errors.csv"
    if errors:
        schema = pa.schema([("sound", pa.string()), ("error", pa.string())])
        rows = ({"sound": name, "error": error} for name, error in errors.items())
        _write_csv(error_file, rows, schema)
    else:
        error_file.unlink(missing_ok=True)
    return errors


def path_of(sound: str) -> PurePath:
    """A sound's name as a path inside a folder: unique, and legal on every system."""
    pieces = [piece for piece in re.split(r"[/\\]+", sound) if piece not in ("", ".")]
    pieces = ["__" if piece == ".." else re.sub(r'[<>:"|?*]', "_", piece) for piece in pieces]
    return PurePath(*pieces)


def _span(per: str) -> list[tuple[str, pa.DataType]]:
    if per == "window":
        return [("start", pa.float64()), ("end", pa.float64())]
    return [("duration", pa.float64())]


def _schema(per: str, top_k: int) -> pa.Schema:
    ranks = [
        field
        for rank in range(1, top_k + 1)
        for field in ((f"label_{rank}", pa.string()), (f"score_{rank}", pa.float32()))
    ]
    return pa.schema([("sound", pa.string()), *_span(per), *ranks])


def _table_rows(rows: Iterable[Row], per: str, top_k: int) -> Iterator[Row]:
    for row in rows:
        for part in row["windows"] if per == "window" else [row]:
            flat = {"sound": row["sound"], **{name: part[name] for name, _ in _span(per)}}
            for rank, entry in enumerate(part["labels"][:top_k], start=1):
                flat[f"label_{rank}"] = entry["label"]
                flat[f"score_{rank}"] = entry["score"]
            yield flat


def _event_rows(rows: Iterable[Row]) -> Iterator[Row]:
    return ({"sound": row["sound"], **event} for row in rows for event in row["events"])


def _embedding_rows(rows: Iterable[Row], per: str) -> Iterator[Row]:
    for row in rows:
        windows, vectors = row["windows"], row["embeddings"]
        if per == "window":
            for window, vector in zip(windows, vectors, strict=True):
                yield {"sound": row["sound"], **window, "embedding": vector}
        else:
            weights = [window["end"] - window["start"] for window in windows]
            mean = np.average(vectors, axis=0, weights=weights)
            yield {"sound": row["sound"], "duration": row["duration"], "embedding": mean}


def _write_csv(path: Path, rows: Iterable[Row], schema: pa.Schema) -> None:
    def write(unfinished: Path) -> None:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, schema.names)
            writer.writeheader()
            writer.writerows(map(_rounded, rows))

    _replace(path, write)


def _write_json(path: Path, rows: Iterable[Row], _: pa.Schema) -> None:
    """One array, one row per line."""

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                file.write(",\n" if number else "[\n")
                file.write(json.dumps(_rounded(row), ensure_ascii=False))
            file.write("\n]\n" if file.tell() else "[]\n")

    _replace(path, write)


def _write_parquet(path: Path, rows: Iterable[Row], schema: pa.Schema) -> None:
    def write(unfinished: Path) -> None:
        remaining = iter(rows)
        with pq.ParquetWriter(unfinished, schema) as writer:
            while some := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist(some, schema=schema))

    _replace(path, write)


def _rounded(row: Row) -> Row:
    return {key: round(x, 6) if isinstance(x, float) else x for key, x in row.items()}


def _write_audacity(folder: Path, row: Row) -> None:
    """A label track: File > Import > Labels. Start, end and text, separated by tabs."""
    lines = [
        f"{event['start']:.6f}\t{event['end']:.6f}\t{_one_line(event['label'])}"
        for event in row["events"]
    ]
    _write_lines(folder / f"{path_of(row['sound'])}.txt", lines)


def _write_raven(folder: Path, row: Row) -> None:
    """A selection table: File > Open Sound Selection Table. The box spans what the model hears."""
    columns = ["Selection", "View", "Channel", "Begin Time (s)", "End Time (s)"]
    columns += ["Low Freq (Hz)", "High Freq (Hz)", "Label", "Score"]
    lines = ["\t".join(columns)]
    for number, event in enumerate(row["events"], start=1):
        span = f"{event['start']:.6f}\t{event['end']:.6f}\t0\t8000"
        label = f"{_one_line(event['label'])}\t{event['score']:.4f}"
        lines.append(f"{number}\tSpectrogram 1\t1\t{span}\t{label}")
    _write_lines(folder / f"{path_of(row['sound'])}.Table.1.selections.txt", lines)


def _one_line(label: str) -> str:
    return " ".join(label.split())


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    _replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, then take its place: nobody sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    write(unfinished)
    os.replace(unfinished, path)
