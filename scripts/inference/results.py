"""Makes the files that people read from the parts of an output folder.

OUTPUT/windows.csv, events.csv, audacity/…, embeddings.parquet, answers.parquet …
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ..common.files import write_whole
from ..common.tables import write_csv
from .formats import FORMATS, write_parquet
from .parts import Parts, Result

_EVENTS = {"sound": "string", "start": "double", "end": "double", "label": "string"}
_EVENTS |= {"score": "float"}
_ROOT = "root"  # the folder of sounds with absolute paths
_NAME_BYTES = 160  # of a folder or file; the limit, with our suffixes and "unfinished", is 255


def collect(
    folder: Path,
    per: str,
    formats: Iterable[str],
    top_k: int,
    embeddings: bool,
    answers: Mapping[str, str] | None = None,
    begun: Sequence[Result] = (),
) -> dict[str, str]:
    """Make the files that people read from the parts.

    Args:
        folder: the output folder.
        per: "window" or "file": what one row of the table and of the embeddings stands for.
        formats: names in `FORMATS`.
        top_k: labels in a row.
        embeddings: also write embeddings.parquet.
        answers: also write answers.parquet, and this, with the names of the labels as JSON, in its
            header: the windows' vectors begin with their logits.
        begun: what is known so far of recordings that are being heard, for the tables.

    Returns:
        errors: name of the sound -> what is wrong with it.
    """
    parts = Parts(folder)
    names = {result.sound for result in begun}

    def results() -> Iterator[Result]:
        yield from (result for result in parts.results() if result.sound not in names)
        yield from begun

    for name in formats:
        how = FORMATS[name]
        if how.table is not None:
            columns = _columns(per, top_k)
            how.table(folder / f"{per}s.{name}", columns, _rows(results(), per, top_k))
            how.table(folder / f"events.{name}", _EVENTS, _event_rows(results()))
        if how.events is not None:
            how.events(folder / f"{name}{how.suffix}", _event_rows(results()))
        if how.track is not None:
            for result in results():
                path = file_of(folder / name, result.sound, how.suffix)
                _write_text(path, how.track(result.events))
    labels = 0 if answers is None else len(json.loads(answers["label_names"]))
    if embeddings:
        columns = {"sound": "string", **_span(per), "embedding": "vector"}
        rows = _embedding_rows(parts.results(embeddings=True), per, labels)
        write_parquet(folder / "embeddings.parquet", columns, rows)
    if answers is not None:
        columns = {"sound": "string", **_span("window"), "logits": "vector"}
        columns |= {"embedding": "vector"} if embeddings else {}
        rows = _answer_rows(parts.results(embeddings=True), labels)
        write_parquet(folder / "answers.parquet", columns, rows, answers)
    errors = {result.sound: str(result.error) for result in parts.results(errors=True)}
    error_file = folder / "errors.csv"
    if errors:
        table = ({"sound": name, "error": error} for name, error in errors.items())
        write_csv(error_file, ["sound", "error"], table)
    else:
        error_file.unlink(missing_ok=True)
    return errors


def file_of(folder: Path, sound: str, suffix: str) -> Path:
    """The path of a file about a sound, in a folder of such files."""
    return folder / f"{path_of(sound)}{suffix}"


def path_of(sound: str) -> PurePath:
    """A sound's name as a path inside a folder: unique, and legal on every system.

    A name that is neither, or too long for a file system, is shortened and changed, and gets a
    checksum of itself at the end.
    """
    pieces = sound.split("/")
    if pieces[0] == "":  # an absolute path
        pieces[0] = _ROOT
        is_plain = len(pieces) > 1
    else:
        is_plain = pieces[0] != _ROOT
    legal = []
    for piece in pieces:
        changed = re.sub(r'[<>:"|?*\\\x00-\x1f\x7f]', "_", piece)
        changed = changed.encode("utf-8", "backslashreplace")[:_NAME_BYTES].decode(
            "utf-8", "ignore"
        )
        changed = re.sub(r"[. ]+$", lambda ending: "_" * len(ending[0]), changed)
        is_plain &= changed == piece and piece != ""
        if changed:
            legal.append(changed)
    if not is_plain:
        checksum = hashlib.sha256(sound.encode("utf-8", "surrogateescape")).hexdigest()[:10]
        legal = [*legal[:-1], f"{legal[-1] if legal else ''}-{checksum}"]
    return PurePath(*legal)


def _span(per: str) -> dict[str, str]:
    return {"start": "double", "end": "double"} if per == "window" else {"duration": "double"}


def _columns(per: str, top_k: int) -> dict[str, str]:
    columns = {"sound": "string", **_span(per)}
    for rank in range(1, top_k + 1):
        columns |= {f"label_{rank}": "string", f"score_{rank}": "float"}
    return columns


def _rows(results: Iterable[Result], per: str, top_k: int) -> Iterator[dict[str, Any]]:
    for result in results:
        for part in result.windows if per == "window" else [result]:
            row = {"sound": result.sound, **{name: getattr(part, name) for name in _span(per)}}
            for rank, entry in enumerate(part.labels[:top_k], start=1):
                row[f"label_{rank}"], row[f"score_{rank}"] = entry.label, entry.score
            yield row


def _event_rows(results: Iterable[Result]) -> Iterator[dict[str, Any]]:
    return ({"sound": r.sound, **event._asdict()} for r in results for event in r.events)


def _answer_rows(results: Iterable[Result], labels: int) -> Iterator[dict[str, Any]]:
    for result in results:
        for window, vector in zip(result.windows, result.embeddings, strict=True):
            span = {"start": window.start, "end": window.end}
            answer = {"logits": vector[:labels], "embedding": vector[labels:]}
            yield {"sound": result.sound, **span, **answer}


def _embedding_rows(results: Iterable[Result], per: str, labels: int) -> Iterator[dict[str, Any]]:
    for result in results:
        windows, vectors = result.windows, result.embeddings[:, labels:]
        if per == "window":
            for window, vector in zip(windows, vectors, strict=True):
                span = {"start": window.start, "end": window.end}
                yield {"sound": result.sound, **span, "embedding": vector}
        else:
            weights = [window.end - window.start for window in windows]
            mean = np.average(vectors, axis=0, weights=weights)
            yield {"sound": result.sound, "duration": result.duration, "embedding": mean}


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
