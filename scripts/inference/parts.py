"""The parts that an output folder is made from: results as they arrive, whole or not at all.

    OUTPUT/settings.json                    what results depend on; must be the same when resuming
    OUTPUT/parts/rank00000-000000.parquet   one row per sound
    OUTPUT/parts/….unfinished.npz           the windows so far of a sound that was interrupted

Any number of processes, in sequence or in parallel, write their own parts into one folder;
`common.lock.hold` ensures that no two have the same rank. What a killed process had not written is
missing from the parts, and the next one does it. A sound that changed after it was classified is
done again, and the latest row counts.
"""

import functools
import hashlib
import itertools
import json
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeling_ast.events_ast import Event
from modeling_ast.scores_ast import LabelScore

from ..common.files import write_whole
from .heard import Heard, Span

if TYPE_CHECKING:
    import pyarrow as pa

_FORMAT = 2  # of the parts


@dataclass
class Result:
    """What is known about a sound: what was heard in it, or why it could not be read."""

    sound: str
    version: str = ""
    duration: float = 0.0  # seconds
    error: str | None = None
    labels: list[LabelScore] = field(default_factory=list)
    windows: list[Span] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    embeddings: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the results depend on, or compare it with what the folder has.

    Raises:
        ValueError: if the folder holds results with other settings.
    """
    path = folder / "settings.json"
    text = json.dumps({**settings, "format": _FORMAT}, indent=2, sort_keys=True)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Choose another --output, or remove that folder."
        ) from error
    wanted = json.loads(text)
    changed = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if changed:
        key = sorted(changed)[0]
        raise ValueError(
            f"{folder} holds results with {key} {found.get(key)!r}, but this run has "
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

    def write(self, results: Sequence[Result]) -> None:
        """Write one part with a row per sound; after a crash it is whole or absent."""
        if not results:
            return
        # Not needed, and not imported, where results are only printed.
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([_row(result) for result in results], schema=_schema())
        path = self.folder / f"{self._prefix}{next(self._numbers):06d}.parquet"
        write_whole(path, lambda unfinished: pq.write_table(table, unfinished))
        for result in results:
            self._unfinished(result.sound).unlink(missing_ok=True)

    def write_unfinished(self, sound: str, version: str, heard: Heard) -> None:
        """Keep the windows so far of an unfinished sound."""
        about = json.dumps({"sound": sound, "version": version})

        def write(unfinished: Path) -> None:
            with unfinished.open("wb") as file:
                np.savez(
                    file,
                    about=np.array(about),
                    spans=np.array(heard.spans),
                    scores=heard.scores,
                    embeddings=heard.embeddings,
                )

        write_whole(self._unfinished(sound), write)

    def unfinished(self, sound: str, version: str, label_names: Sequence[str]) -> Heard:
        """The windows of a sound kept by an interrupted run; empty if there are none."""
        try:
            with np.load(self._unfinished(sound), allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                if about == {"sound": sound, "version": version}:
                    return Heard.of_arrays(
                        label_names, arrays["spans"], arrays["scores"], arrays["embeddings"]
                    )
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # damaged: start the sound again
        return Heard(label_names)

    def done(self) -> dict[str, str]:
        """The sounds that were classified, and which version of each."""
        return {
            sound: version
            for sound, (_, _, version, failed) in self._latest().items()
            if not failed
        }

    def results(self, errors: bool = False, embeddings: bool = False) -> Iterator[Result]:
        """Each sound once: those that were classified, or those that failed.

        Embeddings are read only on request.
        """
        latest = self._latest()
        everything = _schema().names
        columns = [name for name in everything if name != "embeddings"]
        for path in self._paths():
            table = _read(path, everything if embeddings else columns)
            for index, row in enumerate(table.select(columns).to_pylist()):
                # Another process may have written a part since.
                wanted = latest.get(row["sound"], ())[:2] == (path, index)
                if wanted and (row["error"] is not None) == errors:
                    result = _result(row)
                    if embeddings:
                        vectors = table["embeddings"][index].values
                        flat = vectors.flatten().to_numpy()
                        result.embeddings = flat.reshape(len(vectors), -1)
                    yield result

    def errors(self) -> dict[str, str]:
        """The sounds that could not be read, and why."""
        failed = {sound for sound, (*_, is_error) in self._latest().items() if is_error}
        return {
            row["sound"]: row["error"]
            for path in self._paths()
            for row in _read(path, ["sound", "error"]).to_pylist()
            if row["sound"] in failed and row["error"] is not None
        }

    def count(self) -> tuple[int, int]:
        """Sounds that were classified, and their windows."""
        import pyarrow.compute as pc

        latest = self._latest()
        sounds = windows = 0
        for path in self._paths():
            rows = _read(path, ["sound", "windows"])
            lengths = pc.list_value_length(rows["windows"]).to_pylist()
            for index, sound in enumerate(rows["sound"].to_pylist()):
                place, row, _, failed = latest[sound]
                if not failed and (place, row) == (path, index):
                    sounds, windows = sounds + 1, windows + lengths[index]
        return sounds, windows

    def arrays(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Each sound that was classified: name, its windows' spans (n, 2), embeddings (n, D)."""
        latest = self._latest()
        for path in self._paths():
            rows = _read(path, ["sound", "windows", "embeddings"])
            for index, sound in enumerate(rows["sound"].to_pylist()):
                place, row, _, failed = latest[sound]
                if failed or (place, row) != (path, index):
                    continue
                windows = rows["windows"][index].values
                spans = [windows.field(name).to_numpy() for name in ("start", "end")]
                vectors = rows["embeddings"][index].values
                flat = vectors.flatten().to_numpy()
                yield sound, np.stack(spans, axis=1), flat.reshape(len(vectors), -1)

    def _latest(self) -> dict[str, tuple[Path, int, str, bool]]:
        """Sound -> where its row is, its version, whether it failed. A success beats a failure of
        the same version."""
        found: dict[str, tuple[Path, int, str, bool]] = {}
        order: dict[str, tuple[Any, ...]] = {}
        for path in self._paths():
            table = _read(path, ["sound", "version", "written", "error"])
            for index, row in enumerate(table.to_pylist()):
                sound, failed = row["sound"], row["error"] is not None
                rank = (row["written"], not failed)
                if sound not in order or rank >= order[sound]:
                    order[sound] = rank
                    found[sound] = (path, index, row["version"], failed)
        return found

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("rank*.parquet"))

    def _unfinished(self, sound: str) -> Path:
        name = hashlib.sha256(sound.encode()).hexdigest()[:16]
        return self.folder / f"{name}.unfinished.npz"


@functools.cache
def _schema() -> "pa.Schema":
    import pyarrow as pa

    labels = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))
    span = [("start", pa.float64()), ("end", pa.float64())]
    event = pa.struct([*span, ("label", pa.string()), ("score", pa.float32())])
    return pa.schema(
        [
            ("sound", pa.string()),
            ("version", pa.string()),  # of the sound, `Recording.version`
            ("written", pa.int64()),  # ns since 1970
            ("duration", pa.float64()),  # seconds
            ("error", pa.string()),  # null: there was none
            ("labels", labels),  # of the whole sound, best first
            ("windows", pa.list_(pa.struct([*span, ("labels", labels)]))),
            ("events", pa.list_(event)),
            ("embeddings", pa.list_(pa.list_(pa.float32()))),  # one per window, or none
        ]
    )


def _read(path: Path, columns: Sequence[str]) -> "pa.Table":
    from pyarrow.parquet import read_table

    return read_table(path, columns=columns)


def _row(result: Result) -> dict[str, Any]:
    row = {**vars(result), "written": time.time_ns(), "embeddings": list(result.embeddings)}
    row["labels"] = _dicts(result.labels)
    row["events"] = _dicts(result.events)
    row["windows"] = [
        {"start": span.start, "end": span.end, "labels": _dicts(span.labels)}
        for span in result.windows
    ]
    return row


def _dicts(items: Iterable[LabelScore] | Iterable[Event]) -> list[dict[str, Any]]:
    return [item._asdict() for item in items]


def _result(row: dict[str, Any]) -> Result:
    def labels(entries: list[dict[str, Any]] | None) -> list[LabelScore]:
        return [LabelScore(**entry) for entry in entries or ()]

    return Result(
        sound=row["sound"],
        version=row["version"],
        duration=row["duration"],
        error=row["error"],
        labels=labels(row["labels"]),
        windows=[Span(w["start"], w["end"], labels(w["labels"])) for w in row["windows"] or ()],
        events=[Event(**event) for event in row["events"] or ()],
    )
