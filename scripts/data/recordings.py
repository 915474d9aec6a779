"""What to classify: files, folders, globs and datasets as one list of named sounds.

Every sound has a name that is the same in every run and process: a file's path, or
DATASET#SHARD-ROW/FILE for a row of a dataset.
"""

import glob
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.options import did_you_mean
from ..common.shown import valid_text
from .suffixes import AUDIO_SUFFIXES

if TYPE_CHECKING:
    from datasets import IterableDataset

_DATASET_SUFFIXES = (".parquet", ".tar")


@dataclass(frozen=True)
class Recording:
    """A named sound.

    `version` changes when the sound does: size and time of a file, size and checksum of a row's
    bytes; "" if unknown.
    """

    name: str
    source: Any  # what `load_audio` reads
    version: str = ""


class Recordings:
    """The sounds that some arguments name, to be shared among processes.

    Args:
        arguments: each an audio file or an http(s) address; a folder that is searched recursively
            for audio files, or that holds Parquet or tar files; a glob; a Parquet or tar file; or
            the name of a dataset on the Hub, OWNER/NAME.
        split, config, audio_column: for the datasets among them.

    Raises:
        ValueError: for a folder or a glob without sounds, or a dataset that cannot be opened.
    """

    def __init__(
        self,
        arguments: Iterable[str],
        split: str = "train",
        config: str | None = None,
        audio_column: str = "audio",
    ):
        files: dict[str, None] = {}  # an ordered set: a file named twice is one sound
        self.datasets: dict[str, IterableDataset] = {}
        self.audio_column = audio_column
        for argument in arguments:
            found = _files(argument)
            if found is None:
                self.datasets[argument] = self._open(argument, split, config)
            else:
                files.update(dict.fromkeys(found))
        self.files = list(files)

    def _open(self, dataset: str, split: str, config: str | None) -> "IterableDataset":
        from .sources import open_stream  # takes seconds to import, and files do not need it

        stream = open_stream(dataset, split, config)
        columns = stream.column_names or list(next(iter(stream), {}))
        if self.audio_column not in columns:
            raise ValueError(
                f"{dataset} has no column {self.audio_column!r} (--audio_column)"
                + did_you_mean(self.audio_column, columns)
            )
        return stream.select_columns([self.audio_column])

    def share(self, index: int, count: int) -> "Iterator[Recording]":
        """The sounds of process `index` of `count`; together, the processes get each sound once.

        A dataset is split by shards (Parquet or tar files), so that only one process reads each;
        one with fewer shards than processes is read by all and split row by row.
        """
        for file in self.files[index::count]:
            yield Recording(valid_text(file), file, _file_version(file))
        for dataset, stream in self.datasets.items():
            shards = stream.num_shards
            for shard in range(shards):
                if shards >= count and shard % count != index:
                    continue
                part = stream.shard(shards, shard) if shards > 1 else stream
                rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(part)
                if shards < count:
                    rows = itertools.islice(rows, index, None, count)
                for row, example in rows:
                    sound = example[self.audio_column]
                    name = f"{dataset}#{shard}-{row}{_file_name(sound)}"
                    yield Recording(valid_text(name), sound, _row_version(sound))

    def files_in_share(self, index: int, count: int) -> int | None:
        """How many sounds the share holds; None if datasets do not tell."""
        return None if self.datasets else len(self.files[index::count])


def locate(
    names: Iterable[str],
    split: str = "train",
    config: str | None = None,
    audio_column: str = "audio",
) -> dict[str, Any]:
    """Find the sounds that `Recordings` named, in a form that `load_audio` reads.

    Args:
        names: of recordings.
        split, config, audio_column: for the datasets among them.

    Raises:
        ValueError: for a sound that no longer exists.
    """
    found: dict[str, Any] = {}
    rows: dict[str, set[str]] = {}  # dataset -> names
    for name in names:
        dataset, hash_sign, _ = name.partition("#")
        if Path(name).is_file() or name.startswith(("http://", "https://")):
            found[name] = name
        elif hash_sign:
            rows.setdefault(dataset, set()).add(name)
        else:
            raise ValueError(f"{name} has moved, or this is not the folder you ran from before.")
    for dataset, wanted in rows.items():
        for recording in Recordings([dataset], split, config, audio_column).share(0, 1):
            if recording.name in wanted:
                found[recording.name] = recording.source
                wanted.discard(recording.name)
            if not wanted:
                break
        if wanted:
            raise ValueError(f"{sorted(wanted)[0]} is no longer in its dataset.")
    return found


def _files(argument: str) -> list[str] | None:
    """The audio files that an argument names; None for a dataset."""
    path = Path(argument)
    if not argument.strip():
        raise ValueError("Expected a file, a folder or a dataset; got an empty name.")
    if argument.startswith(("http://", "https://")):
        return [argument]
    if path.is_dir():
        files = _audio_files(path)
        if files:
            return files
        if any(file for suffix in _DATASET_SUFFIXES for file in path.rglob(f"*{suffix}")):
            return None
        raise ValueError(
            f"{argument} holds no sounds: expected audio files ({', '.join(sorted(AUDIO_SUFFIXES))}"
            "), Parquet or tar files, in it or in its sub-folders."
        )
    if not path.exists() and glob.has_magic(argument):
        if path.suffix in _DATASET_SUFFIXES:
            return None
        found = sorted(map(Path, glob.glob(argument, recursive=True)))
        # A glob may match other files, too; a file named explicitly is always tried.
        files = [str(file) for file in found if file.suffix.lower() in AUDIO_SUFFIXES]
        files += [file for folder in found if folder.is_dir() for file in _audio_files(folder)]
        if not files:
            raise ValueError(f"No sound matches {argument}.")
        return files
    if path.exists() or path.suffix:
        return None if path.suffix in _DATASET_SUFFIXES else [str(path)]
    is_hub_name = argument.count("/") == 1 and not argument.startswith((".", "/", "~"))
    return None if is_hub_name else [argument]


def _audio_files(folder: Path) -> list[str]:
    return [
        str(file)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
    ]


def _file_version(file: str) -> str:
    try:
        status = os.stat(file)
    except (OSError, ValueError):  # an address, or an impossible file name
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _row_version(sound: Any) -> str:
    encoded = sound.get("bytes") if isinstance(sound, dict) else sound
    if isinstance(encoded, bytes):
        return f"{len(encoded)}-{zlib.crc32(encoded):08x}"
    path = sound.get("path") if isinstance(sound, dict) else sound
    return _file_version(path) if isinstance(path, str) else ""


def _file_name(sound: Any) -> str:
    path = sound.get("path") if isinstance(sound, dict) else sound if isinstance(sound, str) else ""
    return f"/{Path(path).name}" if path else ""
