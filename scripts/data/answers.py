"""Finds a teacher's stored answers for the exact stretch of sound that a student gets.

    columns     of the dataset: the whole sound's logits, its embedding
    files       Parquet, a row per sound or stretch of one, from `ast-classify --logits` or
                elsewhere: sound (or file, name, path), offset or start, length, end or duration in
                seconds, logits, embedding

    answer      targets (labels,) and embedding (D,) as one vector (labels + D,)

A vector is a list of numbers or the bytes of float16 numbers. Targets are probabilities, so answers
to several stretches can be averaged, and those of mixed sounds mixed, like any labels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.dataset
import torch
from torch import Tensor

from feature_extraction import AudioDecodingError

from .fingerprint import short_name

LOGITS, EMBEDDING, KEY = "teacher_logits", "teacher_embedding", "teacher_key"  # of a row
ACTIVATIONS = ("sigmoid", "softmax")
_NAME_COLUMNS = ("sound", "file", "name", "path")
_START_COLUMNS = ("offset", "start")
_LENGTH_COLUMNS = ("length", "duration")

Row = Mapping[str, Any]
Span = tuple[float, float]  # seconds


@dataclass
class Answers:
    """A teacher's answers to sounds.

    Args:
        num_labels: of its logits; 0 if there are only embeddings.
        embedding_size: 0 if there are only logits.
        activation: from logits to probabilities: "sigmoid", each label by itself, or "softmax".
        label_names: of the logits, if known.
        temperature: logits are divided by it.
    """

    num_labels: int
    embedding_size: int
    activation: str | None = None
    label_names: list[str] | None = None
    temperature: float = 1.0

    def __call__(self, row: Row, spans: Sequence[Span]) -> Tensor:
        """The answer (labels + D,) to some stretches of a row's sound together.

        Raises:
            AudioDecodingError: if there is none.
        """
        logits, embeddings, weights = self._found(row, spans)
        share = torch.from_numpy(weights / weights.sum()).float()[:, None]
        scores = probabilities(torch.from_numpy(logits).float(), self.activation, self.temperature)
        parts = [scores, torch.from_numpy(embeddings).float()]
        return (torch.cat(parts, dim=1) * share).sum(dim=0)

    def _found(self, row: Row, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits (n, labels), embeddings (n, D) and weights (n,) of the answers that apply."""
        raise NotImplementedError


def probabilities(logits: Tensor, activation: str | None, temperature: float = 1.0) -> Tensor:
    """Logits (…, labels) as targets."""
    logits = logits / temperature
    return logits.softmax(dim=-1) if activation == "softmax" else logits.sigmoid()


@dataclass
class ColumnAnswers(Answers):
    """Answers in the dataset itself, one per row, whichever part of the sound is used."""

    def _found(self, row: Row, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        vectors = []
        for name, size in ((LOGITS, self.num_labels), (EMBEDDING, self.embedding_size)):
            vector = read_vector(row[name]) if size else np.empty(0, np.float32)
            if len(vector) != size:
                raise AudioDecodingError(
                    f"{row['name']} has {len(vector)} numbers as {name}, expected {size}"
                )
            vectors.append(vector[None])
        return vectors[0], vectors[1], np.ones(1)


@dataclass
class FileAnswers(Answers):
    """Answers from Parquet files, found by a sound's name, or by a column that both have.

    Args:
        where: the files, for messages.
        logits, embeddings: (rows, labels), (rows, D).
        spans: (rows, 2), seconds; to infinity if an answer is for the whole sound.
        rows: by key; names also have short forms, with None if several sounds share one.
    """

    where: str = ""
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    embeddings: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    spans: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    rows: dict[str, list[int] | None] = field(default_factory=dict)

    def knows(self, row: Row) -> bool:
        return self._rows_of(row) is not None

    def _rows_of(self, row: Row) -> list[int] | None:
        keys = [str(row[KEY])] if KEY in row else _forms(row["name"])
        return next((found for key in keys if (found := self.rows.get(key))), None)

    def _found(self, row: Row, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = self._rows_of(row)
        if rows is None:
            raise AudioDecodingError(f"the teacher's answers in {self.where} have no such sound")
        starts, ends = self.spans[rows].T
        overlap = sum(
            np.clip(np.minimum(ends, end) - np.maximum(starts, start), 0, None)
            for start, end in spans
        )
        if not np.any(overlap):
            heard = ", ".join(f"{start:.2f} to {end:.2f} s" for start, end in spans)
            raise AudioDecodingError(f"the teacher's answers in {self.where} have none to {heard}")
        heard_rows = np.asarray(rows)[overlap > 0]
        return self.logits[heard_rows], self.embeddings[heard_rows], overlap[overlap > 0]


def read_vector(value: Any) -> np.ndarray:
    """A list of numbers, or the bytes of float16 numbers, as float32 (n,)."""
    if isinstance(value, bytes):
        return np.frombuffer(value, np.float16).astype(np.float32)
    return np.asarray([] if value is None else value, np.float32).reshape(-1)


def is_answers(name: str) -> bool:
    """Whether a name means files of answers rather than a model."""
    path = Path(name)
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.parquet"))
    return path.suffix == ".parquet"


def answer_files(names: Sequence[str]) -> list[Path]:
    """The Parquet files given by names of files, folders or globs.

    Raises:
        ValueError: if one of them matches none.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        found = sorted(path.glob("*.parquet") if path.is_dir() else path.parent.glob(path.name))
        if not found:
            raise ValueError(f"No such file of a teacher's answers: {name}")
        files += found
    return files


def read_answers(names: Sequence[str], key_column: str | None = None) -> FileAnswers:
    """A teacher's answers from Parquet files, see above; all files belong to one teacher.

    Args:
        names: files, folders or globs.
        key_column: identifies sounds, instead of their names.

    Raises:
        ValueError: for files without the columns or with vectors of unequal length.
    """
    files = answer_files(names)
    where = " ".join(names)
    try:
        data = pyarrow.dataset.dataset([str(file) for file in files], format="parquet")
        columns = data.schema.names
        name_column = key_column or next((c for c in _NAME_COLUMNS if c in columns), None)
        if name_column is None or name_column not in columns:
            wanted = key_column or " or ".join(_NAME_COLUMNS)
            raise ValueError(
                f"{where} has no column {wanted} that names the sounds; it has "
                f"{', '.join(columns)}. Name one that the dataset has, too: --teacher_key COLUMN."
            )
        wanted_columns = {"logits", "embedding", "end", name_column}
        wanted_columns |= {*_START_COLUMNS, *_LENGTH_COLUMNS}
        table = data.to_table(columns=[name for name in columns if name in wanted_columns])
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"Cannot read {where}: {' '.join(str(error).split())}") from error
    if not {"logits", "embedding"} & set(columns):
        raise ValueError(
            f"{where} has neither a column 'logits' nor 'embedding'; it has {', '.join(columns)}."
        )
    logits, embeddings = (_matrix(table, name, where) for name in ("logits", "embedding"))
    names_of_rows = [str(name) for name in table[name_column].to_pylist()]
    metadata = data.schema.metadata or {}
    stored_names = metadata.get(b"label_names")
    return FileAnswers(
        num_labels=logits.shape[1],
        embedding_size=embeddings.shape[1],
        activation=metadata.get(b"activation", b"").decode() or None,
        label_names=None if stored_names is None else json.loads(stored_names),
        where=where,
        logits=logits,
        embeddings=embeddings,
        spans=_spans(table),
        rows=_index(names_of_rows, with_forms=key_column is None),
    )


def _forms(name: str) -> list[str]:
    """A sound's names, most precise first: whole; last folder and file; file; without suffix."""
    path = Path(name)
    return list(dict.fromkeys([name, short_name(name), path.name, path.stem]))


def _index(names: Sequence[str], with_forms: bool) -> dict[str, list[int] | None]:
    whole: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        whole.setdefault(name, []).append(row)
    index: dict[str, list[int] | None] = {}
    for name, rows in whole.items():
        for form in _forms(name) if with_forms else ():
            index[form] = None if form in index else rows
    return {**index, **whole}


def _matrix(table: pyarrow.Table, column: str, where: str) -> np.ndarray:
    """A column of vectors as (rows, n); (rows, 0) if there is no such column."""
    if column not in table.column_names:
        return np.empty((len(table), 0), np.float32)
    vectors = [read_vector(value) for value in _values(table[column])]
    sizes = {len(vector) for vector in vectors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"The column {column!r} of {where} has vectors of lengths {sorted(sizes)[:5]}, "
            "expected one length, above 0."
        )
    return np.stack(vectors)


def _values(column: pyarrow.ChunkedArray) -> Any:
    is_binary = pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)
    for value in column:
        yield value.as_py() if is_binary or not value.is_valid else value.values.to_numpy(False)


def _spans(table: pyarrow.Table) -> np.ndarray:
    """Start and end of each answer, in seconds."""

    def first(names: Sequence[str], default: float) -> np.ndarray:
        found = next((name for name in names if name in table.column_names), None)
        if found is None:
            return np.full(len(table), default)
        return table[found].to_numpy().astype(np.float64)

    starts = first(_START_COLUMNS, 0.0)
    if "end" in table.column_names:
        return np.stack([starts, first(["end"], np.inf)], axis=1)
    return np.stack([starts, starts + first(_LENGTH_COLUMNS, np.inf)], axis=1)
